"""``dit-tiny``: a small diffusion transformer that draws digits, trained here and shipped with the package.

::

    digits.py ── 1,797 real digits ──> train.py ── autoencoder, then transformer ──> pipeline/ (a diffusers folder)

``python -m effcli.dit_tiny.train FOLDER`` makes the shipped folder anew; its ``README.md`` is the model card.
"""

from __future__ import annotations

from pathlib import Path

NAME = "dit-tiny"
FOLDER = Path(__file__).resolve().parent / "pipeline"
RECORD = "training.json"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
