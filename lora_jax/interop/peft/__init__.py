"""PEFT adapter folders: configuration, keys, the plan of a folder, reading and writing."""
