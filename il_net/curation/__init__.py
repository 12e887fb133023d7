"""Making and looking after data sets: importing, checking, mending, splitting, counting."""
