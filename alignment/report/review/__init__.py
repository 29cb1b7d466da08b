"""Did a run generalize? Records -> signals -> verdict -> page, each step a pure function of the one before."""
