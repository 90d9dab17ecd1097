"""A checkpoint as one file for other programs: its input, net and decision in one graph, in fp32.

    python -m utils.export runs/seg/exp/best.pt                      # best.onnx beside it
    python -m utils.export runs/det/exp/best.pt --format pt2         # best.pt2, for torch.export.load

The graph takes `image` (B, C, H, W) float32: the bands of the checkpoint's input in the numbers of the files, NaN where
there is no data. H and W are multiples of the stride, at least two of them. It gives `output`:
    seg   probabilities (B, K, H, W)
    det   rows (B, N, 5 + classes) before non-maximum suppression: x, y of the centre, width, height in pixels of the
          image, objectness, probabilities of the classes; a box's score is objectness times probability
    cls   probabilities (B, K)
A classifier, and a net that was trained with --resize, sees whole images of the size imgsz of its input. The metadata
(in ONNX custom metadata, in pt2 an extra file of the same name) hold as JSON what KEPT names of the checkpoint, and the
stride.
"""
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from nets import pretrained
from predict import load_members
from utils.errors import Parser, UserError, cli
from utils.files import check_absent, whole_file
from utils.ops import decide

KEPT = ("task", "classes", "single_label", "category_ids", "input", "threshold")


class Graph(nn.Module):
    """What predict.py computes for a batch of images. member: predict.Member."""

    def __init__(self, member):
        super().__init__()
        _, self.state, self.net, self.inputs = member

    def forward(self, image):
        task = self.state["task"]
        # a classifier's input would also place the image
        x = self.inputs.normalised(self.inputs.scaled(image)) if task == "cls" else self.inputs(image)
        found = decide.run(self.net, x)
        return found if task == "det" else decide.probabilities(found, self.state.get("single_label", True))


def trace(graph, stride):
    """A Graph -> torch.export.ExportedProgram for any number of images and any size in multiples of the stride."""
    batch, rows, columns = map(torch.export.Dim, ("batch", "rows", "columns"))
    free = {0: batch, 2: stride * rows, 3: stride * columns}
    with torch.no_grad():
        example = torch.zeros(2, len(graph.inputs.bands), 4 * stride, 6 * stride)
        return torch.export.export(graph, (example,), dynamic_shapes=(free,))


def main():
    parser = Parser(prog="python -m utils.export", description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, metavar="PATH", help="a checkpoint, also YOLOv5's and ImageNet classifiers")
    parser.add_argument("--task", choices=("det", "cls"), default="det", help="of weights of others")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="pt2: for torch.export.load")
    parser.set_defaults(amp="off", compile=False)
    args = parser.parse_args()
    out = args.weights.with_suffix(f".{args.format}")
    check_absent(out)
    if args.format == "onnx" and not find_spec("onnxscript"):
        raise UserError("--format onnx: needs two packages; pip install onnx onnxscript, or take --format pt2")
    state = pretrained.checkpoint(args.weights, args.task)
    args.task = state["task"]
    [member] = load_members(args, args.task, torch.device("cpu"), [args.weights], [state])
    stride = getattr(member.net, "stride", 32)  # classifiers do not tell theirs
    metadata = {key: json.dumps(state.get(key)) for key in KEPT} | {"stride": str(stride)}
    program = trace(Graph(member), stride)
    with whole_file(out) as temporary:
        if args.format == "pt2":
            torch.export.save(program, temporary, extra_files=metadata)
        else:
            found = torch.onnx.export(program, input_names=["image"], output_names=["output"], verbose=False)
            found.model.metadata_props.update(metadata)
            found.save(temporary)
    print(f"{out}: images of any number, with sides in multiples of {stride}")


if __name__ == "__main__":
    cli(main)
