"""The families of models, one file each; `registry` finds a family by its `model_type`."""
