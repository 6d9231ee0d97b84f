"""LoRA: the method, its adapted weight, and the starts of its factors."""
