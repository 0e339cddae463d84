"""The regret of BAG with several numbers of blocks, on the synthetic problem of its paper."""
