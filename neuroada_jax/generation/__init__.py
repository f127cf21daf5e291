"""Generation: continuation of prompts by greedy decoding, sampling or beam search."""
