"""MaskUNet: learned binary masks on the linear layers of a frozen diffusion model, per timestep and per sample.

Wang et al., "Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation Ability", CVPR 2025,
arXiv 2505.03097. Equation numbers in the docstrings are the paper's.
"""
