"""Students: load one, make one, train one with LoRA, let one answer."""
