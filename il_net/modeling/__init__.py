"""The IL-net detector: teacher and student, the IoU branch, pseudo labels and losses.

Importing the package registers its meta-architecture.
"""

from .teacher_student import TeacherStudentRCNN

__all__ = ["TeacherStudentRCNN"]
