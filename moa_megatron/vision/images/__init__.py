"""From image files to batches: index, order, augmentation, DALI pipeline."""
