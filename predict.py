"""Predictions: checkpoints in, submission, GeoTIFFs and pictures out.

    python predict.py --task seg --tta                        # newest run, its data's test_img folder
    python predict.py --task seg --weights runs/seg/exp*/best.pt --source scene.tif --tile 512 --polygons
    torchrun --nproc_per_node 4 predict.py --task seg --tta   # the inputs shared out among four GPUs

Several checkpoints are averaged: folds, seeds and epochs make an ensemble.
"""
import argparse

from predict_cls import predict_cls
from predict_det import predict_det
from predict_seg import predict_seg
from utils import checkpoint, dist, runs
from utils.args import Parser, real, whole
from utils.errors import UserError, cli

TASKS = {"seg": predict_seg, "det": predict_det, "cls": predict_cls}


def parse_args():
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--weights", nargs="+", metavar="PATH", help="checkpoints; without: the newest run's best.pt or last.pt")
    add("--source", nargs="+", metavar="PATH|DIR|GLOB", help="images; without: the test images of the "
        "training's data")
    add("--out", metavar="DIR", help="new folder for the results; without: predict in the run's folder")
    add("--tta", action="store_true", help="several views of every image; seg: its flips; det: three sizes, one "
        "flipped; cls: quarter turns")
    add("--bs", type=whole(1, 65536), default=8, help="images per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: half a minute's start, then faster")
    add("--workers", type=whole(0, 256), default=2, help="loader processes per process")
    add("--project", metavar="DIR", help="where to look for the newest run; without: runs/TASK")
    add("--tile", type=whole(16, 65536), help="larger images go through windows of this side; without: twice the "
        "training size for seg, no windows for det")
    add("--overlap", type=real(0, 0.9), default=0.25, help="of neighbouring windows")
    add("--overlays", action=argparse.BooleanOptionalAction, default=True, help="pictures with the result drawn in")
    add("--threshold", type=real(0, 1), default=0.5, help="seg, cls: probability from which a pixel, a class is there")
    add("--imgsz", type=whole(32, 65536), help="det, cls: side of the net's input; without: that of the training")
    add("--ensemble-weights", type=real(1e-6), nargs="+", metavar="W", help="det, cls: of the checkpoints (and then of "
        "the tables)")
    add = parser.add_argument_group("segmentation").add_argument
    add("--polygons", action="store_true", help="also write the masks' outlines as GeoJSON")
    add = parser.add_argument_group("detection").add_argument
    add("--conf", type=real(0, 1), default=0.01, help="lowest score of a detection")
    add("--iou", type=real(0, 1), default=0.7, help="overlap from which the lower score goes")
    add("--max-det", type=whole(1, 100000), default=300, help="most detections per image")
    add("--max-mb", type=real(0.001), default=20.0, help="largest submission.json, 10^6 bytes; the best scores stay")
    add = parser.add_argument_group("classification").add_argument
    add("--probs", nargs="+", metavar="CSV", help="probabilities.csv of earlier predictions, to be averaged in")
    add("--fit-weights", action="store_true", help="find the checkpoints' weights and a threshold per class on the "
        "images that all their runs held out; both are used, and kept in ensemble.json")
    add("--ensemble", metavar="JSON", help="the ensemble.json of an earlier --fit-weights, for the same checkpoints")
    return parser.parse_args()


def main():
    args = parse_args()
    device = dist.setup(args.device)
    paths = args.weights or [runs.newest(args.project or f"runs/{args.task}", "best.pt", "last.pt")]
    states = [checkpoint.load(path) for path in paths]
    for path, state in zip(paths, states):
        if state["task"] != args.task:
            raise UserError(f"{path}: trained for --task {state['task']}; choose that, or other --weights")
    try:
        TASKS[args.task](args, device, paths, states)
    except ConnectionError:  # to a loader worker or to another rank
        raise
    except OSError as error:  # what cannot be read has been answered before
        what = error.filename or args.out or "the results"
        raise UserError(f"{what}: cannot be written ({error.strerror or error}); make room, or choose another --out"
                        ) from None
    dist.barrier()


if __name__ == "__main__":
    cli(main)
