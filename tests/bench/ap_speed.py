"""COCO's box AP: our DetectionAP against pycocotools and faster_coco_eval, on the same random boxes.

    python -m tests.bench.ap_speed [--images 1000] [--detections 100] [--truths 7] [--classes 5] [--rounds 3]

Two times each. "judged": evaluate and accumulate; ours does this in compute(). "in all": from the tensors of a
detector to the six numbers; the others want dicts, which they index. The fastest round counts.
"""
import argparse
import contextlib
import io
import time

import faster_coco_eval
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.metrics.average_precision import AREAS, DetectionAP


def boxes(images, detections, truths, classes, seed=0):
    """-> per image (detections, 6) and (about `truths`, 5). A third of the detections lie near a truth."""
    rng = np.random.default_rng(seed)
    found, actual = [], []
    for n in rng.poisson(truths, images):
        corner, size = rng.uniform(0, 500, (n + detections, 2)), np.exp(rng.uniform(2, 6, (n + detections, 2)))
        xyxy, label = np.concatenate((corner, corner + size), 1), rng.integers(classes, size=n + detections)
        near = rng.integers(n, size=detections // 3) if n else np.zeros(0, int)
        xyxy[n:n + len(near)] = xyxy[near] + rng.normal(0, 0.1, (len(near), 4)) * np.tile(size[near], 2)
        label[n:n + len(near)] = label[near]
        score = rng.uniform(0, 1, n + detections)
        actual.append(torch.from_numpy(np.column_stack((xyxy, label))[:n]).float())
        found.append(torch.from_numpy(np.column_stack((xyxy, score, label))[n:]).float())
    return found, actual


def ours(found, actual, classes):
    began = time.perf_counter()
    metric = DetectionAP(classes)
    for i in range(0, len(found), 16):
        metric.update(found[i:i + 16], actual[i:i + 16])
    ready = time.perf_counter()
    values = metric.compute()
    end = time.perf_counter()
    return [values[name] for name in ("ap", "ap50", "ap75", *list(AREAS)[1:])], end - ready, end - began


def theirs(coco, evaluator, found, actual, classes):
    """The same with pycocotools' classes, which faster_coco_eval has too."""
    began = time.perf_counter()
    truths, detections = [], []
    for i, (new, old) in enumerate(zip(found, actual)):
        for x1, y1, x2, y2, label in old.tolist():
            truths.append({"id": len(truths) + 1, "image_id": i, "category_id": int(label), "iscrowd": 0,
                           "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        for x1, y1, x2, y2, score, label in new.tolist():
            detections.append({"image_id": i, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1],
                               "score": score})
    dataset = {"info": {}, "images": [{"id": i} for i in range(len(found))], "annotations": truths,
               "categories": [{"id": c, "name": str(c)} for c in range(classes)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = dataset
        truth.createIndex()
        run = evaluator(truth, truth.loadRes(detections), "bbox")
        ready = time.perf_counter()
        run.evaluate()
        run.accumulate()
        run.summarize()
    end = time.perf_counter()
    return list(run.stats[:6]), end - ready, end - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--truths", type=int, default=7)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found, actual = boxes(args.images, args.detections, args.truths, args.classes)
    print(f"{args.images} images, {sum(map(len, found))} detections, {sum(map(len, actual))} truths, "
          f"{args.classes} classes; best of {args.rounds}")
    runs = {"pycocotools": lambda: theirs(COCO, COCOeval, found, actual, args.classes),
            "faster_coco_eval": lambda: theirs(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster, found, actual,
                                               args.classes),
            "ours": lambda: ours(found, actual, args.classes)}
    results = {name: [run() for _ in range(args.rounds)] for name, run in runs.items()}
    fastest = {name: np.min([times for _, *times in rounds], 0) for name, rounds in results.items()}
    reference = results["pycocotools"][0][0]
    for name, (judged, whole) in fastest.items():
        ratio, values = fastest[name] / fastest["ours"], results[name][0][0]
        print(f"{name:16} judged {judged:.3f} s, {ratio[0]:4.1f} x ours, in all {whole:.3f} s, {ratio[1]:4.1f} x ours, "
              f"ap {values[0]:.6f}, off by {np.abs(np.subtract(values, reference)).max():.1e}")


if __name__ == "__main__":
    main()
