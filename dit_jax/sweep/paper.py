"""Results of the paper's sweep: twelve models on ImageNet 256, 400,000 steps at batch size 256, FID-50K without guidance.

Source: Peebles & Xie 2023, arXiv 2212.09748v2: table 4 (GMACs, which it prints as Gflops, and FID); figure 8 (correlation -0.93).
"""

from dit_jax.models.sizes import FIDS as FIDS

BATCH_SIZE, NUM_STEPS, NUM_IMAGES, FEATURES = 256, 400_000, 50_000, "inception"
CITATION = "Peebles & Xie 2023, table 4"
