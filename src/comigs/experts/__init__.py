"""This room holds LoRA experts, routers and mixtures, put on a frozen base from outside."""
