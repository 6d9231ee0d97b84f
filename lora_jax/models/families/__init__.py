"""The families of models, one file each; `bundled` finds a family by its `model_type`."""
