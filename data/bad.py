"""What happens to bad images, masks and boxes. They are collected over the whole data set before anything is trained,
counted by kind, written to a list, and shown together. Training goes on without them, unless they are more than 1 %.
"""
import math
import re
from contextlib import suppress

from data import images
from data.cache import facts, in_threads
from utils.errors import UserError, one_line
from utils.files import store_of, write_text
from utils.train import dist

MAX_SHARE = 0.01  # of the items; more is rather a misunderstanding than a slip


def leave_out(root, cases, total, what, *, file, allow_bad, notes={}):
    """Reports bad items: rank 0 prints a line per kind and writes all of them to the text file `file`, if that can be
    written. UserError when more than 1 % of the `total` items (`what`, such as "images") are bad, unless allow_bad.

    cases: {kind: [place of each]}. notes: {kind: what happens to these items}, which are not counted as bad.
    """
    see, cases = "", {kind: places for kind, places in cases.items() if places}
    if cases:
        with suppress(UserError):
            if dist.is_main():
                write_text(file, "".join(f"{kind}: {place}\n" for kind in cases for place in cases[kind]))
            see = f"; all in {file}"
    for kind, places in cases.items():
        dist.print0(f"{root}: {kind}: {len(places)} {notes.get(kind, 'left out')}, first {places[0]}{see}")
    dropped = {kind: places for kind, places in cases.items() if kind not in notes}
    count = sum(map(len, dropped.values()))
    if count > MAX_SHARE * total and not allow_bad:
        kinds = ", ".join(f"{len(places)} {kind}" for kind, places in dropped.items())
        raise UserError(f"{root}: {count} of {total} {what} cannot be used ({kinds}{see}), such as "
                        f"{next(iter(dropped.values()))[0]}; correct them, or go on without them by --allow-bad")


def sort_out(root, items, check, *, variant, allow_bad=False, cache="runs/cache"):
    """-> the indices of the items that can be used, and what check(item) has returned for each of these. The others are
    left out, see `leave_out`.

    items: tuples of files, such as an image and its mask. check: item -> plain values, or a UserError that tells what
    is wrong. variant: what else the result of `check` depends on. cache: the folder in which the results are kept until
    a file or `variant` changes, None: they are not kept.
    """
    cases, file = {}, store_of(cache, "bad", root, variant).with_suffix(".txt")
    found = facts("checks", lambda *item: attempt(check, item), items, variant=variant, cache=cache, bar="check")
    for _, wrong in found:
        if wrong:  # "FILE: kind of fault; remedy"
            cases.setdefault(re.split("[;,(]", wrong.partition(": ")[2])[0].strip(), []).append(wrong)
    leave_out(root, cases, len(items), "images", allow_bad=allow_bad, file=file)
    kept = [i for i, (_, wrong) in enumerate(found) if not wrong]
    if not kept:
        raise UserError(f"{root}: none of its {len(items)} images can be used, such as {found[0][1]}")
    return kept, [found[i][0] for i in kept]


def attempt(function, *args):
    """-> (what function(*args) returns, None), or (None, the message of its UserError)."""
    try:
        return function(*args), None
    except UserError as error:
        return None, one_line(error)


# ---- images ----------------------------------------------------------------------------------------------------------
def readable(root, columns, bands=None, **options):
    """Columns of a data set, the first of which holds image files -> the same as lists, without the images that cannot
    be decoded or lack one of the bands (from 1; None: `default_bands`). options: of `sort_out`."""
    bands = bands or default_bands(columns[0])
    kept, _ = sort_out(root, [(file,) for file in columns[0]], lambda item: decode(*item, bands), variant=bands,
                       **options)
    return [[column[i] for i in kept] for column in columns]


def unreadable(files, bands, longest):
    """-> {file: the message} of the images that `decode` refuses."""
    found = in_threads(lambda file: attempt(decode, file, bands, longest)[1], files, "check")
    return {file: reason for file, reason in zip(files, found) if reason}


def default_bands(files):
    """`images.default_bands` of the files whose headers can be read."""
    images.read_headers(files)
    wrong = {file for file in files if attempt(images.header, file)[1]}
    return images.default_bands([file for file in files if file not in wrong] or files)


def decode(path, bands, longest=math.inf):
    """UserError for an image of which `images.read_picture` cannot give these bands. GeoTIFFs are read in pieces, so
    that memory does not grow with the scene. longest: of an image with a longer side only the header is read."""
    found = images.header(path)
    pieces, shape = (images.strips(found.size), None) if images.in_windows(found) else ([None], (1, 1))
    for window in pieces if max(found.size[1:]) <= longest else ():
        images.read_picture(path, bands, window=window, shape=shape)
