"""From the labelling tool Label Studio to COCO."""
