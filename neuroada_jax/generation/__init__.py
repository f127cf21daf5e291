"""Generation: continuing a prompt, greedily, by sampling or with beams."""
