"""The loss: objectives, kernels, the vocabulary-parallel autograd function, the fused output layer."""
