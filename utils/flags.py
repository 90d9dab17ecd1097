"""The flags of predict.py, and which of them may not be together."""
from argparse import ArgumentDefaultsHelpFormatter, BooleanOptionalAction

from utils.errors import Parser, UserError
from utils.ops import tta
from utils.train.args import float_range, fraction, int_range, noise_list, word

RUNS = ("column,1", "column,0", "row,1", "row,0")  # of --rle: the order of the pixels, the number of the first


def parse(description):
    """The command line of predict.py -> its flags. Raises UserError for flags that do nothing, or contradict each
    other, before anything is read."""
    parser = Parser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    tasks_of = {}

    def add(flag, tasks, **options):
        tasks_of[parser.add_argument(flag, **options).dest] = tasks

    _add_shared(parser.add_argument)
    _add_some(add)
    args = parser.parse_args()
    for flag, tasks in tasks_of.items():
        used = args.task in tasks or args.detector and flag in ("imgsz", "conf", "iou", "max_det")
        if vars(args)[flag] != parser.get_default(flag) and not used:
            raise UserError(f"{word(flag)}: does nothing for --task {args.task}; leave it out")
    _check(args)
    args.conf = (0.25 if args.detector else 0.01) if args.conf is None else args.conf
    return args


def _add_shared(add):
    """The flags of all tasks. add: `add_argument` of a parser."""
    add("--task", choices=("seg", "det", "cls"), required=True)
    add("--weights", nargs="+", metavar="PATH", help="checkpoints, also YOLOv5's and ImageNet "
        "classifiers, and yolov5:yolov5n and other published names; without: the newest run's best.pt or last.pt")
    add("--names", metavar="FILE", help="class names, one per line, for weights of others that have none")
    add("--source", nargs="+", metavar="PATH|DIR|GLOB", help="images; without: the test images of the training's data")
    add("--noisy", type=noise_list, metavar="CSV:K", help="in place of --source: the samples that the checkpoint's run "
        "has held out and that are among the K worst of a noise.csv; --pseudo labels them anew")
    add("--out", metavar="DIR", help="new folder for the results; without: predict in the run's folder")
    add("--tta", nargs="*", choices=tta.NAMES, metavar="NAME", help="test-time augmentation: all combinations of "
        f"{', '.join(tta.NAMES)}; without names: seg, cls what training drew of them, det three sizes, one flipped")
    add("--tta-scales", type=float_range(0.1, 10), nargs="+", metavar="F", help=f"sizes of --tta scale {tta.SCALES}")
    add("--merge", choices=(*tta.MERGES, "wbf"), help="of the views' probabilities (mean; sum is capped at 1 and needs "
        "--threshold, tsharpen averages sqrt(p) and compares with sqrt(threshold)), or wbf of their boxes (det)")
    add("--bs", type=int_range(1, 65536), default=8, help="images per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the net: starts half a minute later, then runs faster")
    add("--workers", type=int_range(0, 256), default=2, help="loader processes per process")
    add("--project", metavar="DIR", help="where to look for the newest run; without: runs/TASK")
    add("--threshold", type=fraction, help="probability above which a pixel or a class is positive, score "
        "from which a box is drawn; without: the best of the validation, which checkpoints store")
    add("--pseudo", type=float_range(0.5, 1), metavar="P", help="also write pseudo labels for --extra-data: what has "
        "this probability; other pixels are ignored, other boxes are background, other images are left out (cls)")
    add("--submission", metavar="SAMPLE", help="the competition's sample submission, CSV or JSON: also write "
        "OUT/SAMPLE, with its rows and columns, filled")
    add("--ids", metavar="JSON", help="a list of the images with their ids, for coco.json and --submission; without: "
        "the training's own, Test_Images_Information.json or image_info*.json, at most two folders above the images")


def _add_some(add):
    """The flags of some tasks. add: function(flag, tasks, options of `add_argument`)."""
    add("--tile", "seg det", type=int_range(16, 65536), help="larger images are read in windows of this side; without: "
        "seg twice the training size (the whole image after --resize), det the training's --tile")
    add("--overlap", "seg det", type=float_range(0, 0.9), help="of windows; without: seg 0.25, det the training's")
    add("--overlays", "seg det", action=BooleanOptionalAction, default=True, help="pictures of the results")
    add("--polygons", "seg", action="store_true", help="also write the masks' outlines as GeoJSON")
    add("--rle", "seg", choices=RUNS, metavar="ORDER,FIRST", help="of --submission: column or row, the order in "
        "which pixels are counted; 1 or 0, the number of the first; without: column,1, or as the sample")
    add("--detector", "seg", metavar="PATH", help="a checkpoint of train_det.py, for which --imgsz, --conf, --iou and "
        "--max-det are: only its boxes, a little enlarged, are segmented")
    add("--imgsz", "det cls", type=int_range(32, 65536), help="side of the net's input; without: as trained")
    add("--conf", "det", type=fraction, help="lowest score of a detection; without: 0.01, --detector 0.25")
    add("--iou", "det", type=fraction, default=0.7, help="boxes that overlap by more suppress each other")
    add("--max-det", "det", type=int_range(1, 100000), default=300, help="most detections per image")
    add("--max-mb", "det", type=float_range(0.001), default=20.0, help="largest submission.json, 10^6 bytes")
    add("--ensemble-weights", "det cls", type=float_range(1e-6), nargs="+", metavar="W", help="one per checkpoint")


def _check(args):
    """Raises UserError where flags do nothing together."""
    # test-time augmentation
    if args.merge and (args.merge == "wbf") != (args.task == "det"):
        raise UserError(f"--merge {args.merge}: not for --task {args.task}; wbf is for boxes, the others are for "
                        f"probabilities")
    if args.merge and args.tta is None:
        raise UserError("--merge: says how the views of --tta are merged; give that too")
    # of single labels too: normalising to a sum of 1 turns only sum into a mean, which is there already
    if args.pseudo and args.merge in ("sum", "max", "min", "tsharpen"):
        raise UserError(f"--pseudo: the results of --merge {args.merge} are no probabilities; take mean or gmean")
    if (args.rle or args.ids) and not args.submission and args.task != "det":
        raise UserError("--rle, --ids: are for --submission; give that too")
    if args.tta_scales and "scale" not in (args.tta or ()):
        raise UserError("--tta-scales: are the sizes of --tta scale; give that too")
    # checkpoints
    count = len(args.weights or ["the newest run's"])
    if args.noisy and (args.source or count > 1):
        raise UserError("--noisy: is for one checkpoint, instead of --source; give one --weights and no --source")
    if args.ensemble_weights and (count == 1 or len(args.ensemble_weights) != count):
        raise UserError(f"--ensemble-weights: {len(args.ensemble_weights)} for {count} checkpoints; leave it out, or "
                        f"give several checkpoints and one weight each")
