"""Results of the paper's sweep: twelve models on ImageNet 256, 400,000 steps at batch size 256, FID-50K without guidance.

Source: Peebles & Xie 2023, arXiv 2212.09748v2: table 4 (GMACs, which it prints as Gflops, and FID); figure 8 (correlation -0.93).
"""

FIDS = {  # model: (GMACs of one forward pass of one image, FID-50K)
    "S/8": (0.36, 153.60),
    "S/4": (1.41, 100.41),
    "S/2": (6.06, 68.40),
    "B/8": (1.42, 122.74),
    "B/4": (5.56, 68.38),
    "B/2": (23.01, 43.47),
    "L/8": (5.01, 118.87),
    "L/4": (19.70, 45.64),
    "L/2": (80.71, 23.33),
    "XL/8": (7.39, 106.41),
    "XL/4": (29.05, 43.01),
    "XL/2": (118.64, 19.47),
}
BATCH_SIZE, NUM_STEPS, NUM_IMAGES, FEATURES = 256, 400_000, 50_000, "inception"
CITATION = "Peebles & Xie 2023, table 4"
