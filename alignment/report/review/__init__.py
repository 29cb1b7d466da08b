"""Did a run generalize? Records -> signals -> verdict -> review.md and report.html, each step a pure function of the one before."""
