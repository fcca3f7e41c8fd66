"""What is measured on a GPU: one command a stage, each within nine minutes; docs/gpu-verification.md has the list."""
