"""One file a family of models; `registry` finds a family by its `model_type`."""
