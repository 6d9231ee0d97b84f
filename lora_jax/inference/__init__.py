"""What a trained adapter answers: classes, numbers and completions."""
