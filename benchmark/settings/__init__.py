"""What is compared: matrix files, presets and recipes, read strictly."""
