"""LoRA: the method (`method.py`), its adapted weight (`weight.py`) and the initial factors (`starts.py`)."""
