"""Pack an adapter into a line of text, and load it from that line.

    python examples/tiny_adapter.py --adapter runs/classifier --ask "what a wonderful film"

The adapter is that of a text classifier, such as text_classification.py trains.
"""

from __future__ import annotations

import argparse

import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_intrinsic.codec import adapter_from_string, adapter_to_string, compress, load_packed, qr_code, read_packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder, or name on the Hub")
    parser.add_argument("--ask", nargs="+", required=True, help="texts to classify")
    parser.add_argument("--levels", type=int, default=8, help="number of values of θ (default: 8)")
    parser.add_argument("--labels", type=int, default=2, help="number of classes (default: 2)")
    parser.add_argument("--qr", help="PNG or SVG file to which the line is written as a QR code")
    args = parser.parse_args()

    model = AutoPeftModelForSequenceClassification.from_pretrained(args.adapter, num_labels=args.labels).eval()
    name = model.peft_config["default"].base_model_name_or_path
    data = compress(model, levels=args.levels)
    line = adapter_to_string(data)
    print(f"{len(data)} bytes: {line}")
    if args.qr:
        qr_code(data, args.qr)

    data = adapter_from_string(line)  # raises if a letter was changed
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=read_packed(data).classes)
    loaded = load_packed(base, data)
    inputs = AutoTokenizer.from_pretrained(name)(args.ask, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole, packed = (m(**inputs).logits.argmax(-1) for m in (model, loaded))
    for text, one, other in zip(args.ask, whole, packed, strict=True):
        print(f"class {one} before, {other} packed: {text}")


if __name__ == "__main__":
    main()
