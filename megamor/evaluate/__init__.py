"""What a trained model is worth: loss under both routing rules, floors to compare with, depth maps, generation."""
