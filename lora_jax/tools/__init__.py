"""On adapters at rest, ours and PEFT's: finding, inspecting, converting, merging."""
