"""Local training, distillation and evaluation on flat parameters."""
