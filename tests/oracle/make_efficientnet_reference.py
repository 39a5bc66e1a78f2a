"""Writes `tests/data/efficientnet_reference.npz`: logits of EfficientNet-Lite0 in torch, with the published weights.

Run it in the environment of `make test-oracle`, with `pip install --no-deps efficientnet-lite-pytorch==0.1.0`:
`PYTHONPATH=examples python tests/oracle/make_efficientnet_reference.py`. The file holds `logits`, `(photos, 1000)`,
float32, of scikit-learn's two sample photos.
"""

from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images

import efficientnet_lite
from minilm import installed_file

REFERENCE = Path(__file__).parent.parent / "data" / "efficientnet_reference.npz"

if __name__ == "__main__":
    weights = installed_file(efficientnet_lite.DISTRIBUTION, efficientnet_lite.WEIGHTS)
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    photos = np.stack([efficientnet_lite.center_square(photo, 224) for photo in load_sample_images().images])
    images = (photos.astype(np.float32).transpose(0, 3, 1, 2) - 127) / 128
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    np.savez_compressed(REFERENCE, logits=logits)
    print(f"{REFERENCE.name}: logits {logits.shape}, {REFERENCE.stat().st_size:,} bytes; {logits.argmax(-1)}")
