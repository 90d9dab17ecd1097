"""What stands on the synthetic parking lots: fourteen classes, trees and lamp posts.

Each is a list of parts, in metres; a part is convex and a list of faces, which are (points (K, 3), colour, width): a
polygon seen from the side from which its points run counter-clockwise, or, with a width, a line of that thickness.
x points forward, y to the left, z up.
"""
import numpy as np

PAINTS = np.array([(236, 236, 232), (28, 29, 32), (150, 154, 160), (90, 94, 100), (40, 62, 110), (140, 30, 34),
                   (92, 110, 118), (120, 100, 80)])
GLASS, TYRE, STEEL, DARK = (44, 54, 66), (22, 22, 24), (168, 172, 176), (52, 54, 58)


# ---- solids --------------------------------------------------------------------------------------------------------
def rect(x0, x1, half, y=0.):
    return np.array([(x1, y - half), (x1, y + half), (x0, y + half), (x0, y - half)])


def _ring(x, y, radius, n=8):
    a = np.arange(n) * 2 * np.pi / n
    return np.stack((x + radius * np.cos(a), y + radius * np.sin(a)), 1)


def _solid(bottom, top, z0, z1, colour):
    """The hull of two polygons (N, 2) at heights z0 < z1 -> N sides and the roof.

    The sides of a rect: front, left, back, right.
    """
    low, high = (np.concatenate((p, np.full((len(p), 1), z)), 1) for p, z in ((bottom, z0), (top, z1)))
    low2, high2 = np.roll(low, -1, 0), np.roll(high, -1, 0)
    return [(q, colour, 0) for q in np.stack((low, low2, high2, high), 1)] + [(high, colour, 0)]


def _box(x0, x1, half, z0, z1, colour, y=0.):
    return _solid(rect(x0, x1, half, y), rect(x0, x1, half, y), z0, z1, colour)


def _pane(face, u0, u1, v0, v1, colour):
    """A piece of a quadrilateral: u to the right, v up, both 0..1 as seen from outside."""
    a, b, c, d = face[0]
    u, v = np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1)]).T[..., None]
    return (1 - u) * (1 - v) * a + u * (1 - v) * b + u * v * c + (1 - u) * v * d, colour, 0


def _line(colour, width, *points):
    return np.array(points, float), colour, width


def _wheel(x, y, radius, sides=(-1, 1), hub=STEEL):
    """A tyre standing along x, seen from these sides (-1: from the right)."""
    faces = []
    for side in sides:
        for r, colour in ((radius, TYRE), (.55 * radius, hub)):
            ring = _ring(0, 0, r, 12)
            faces.append((np.stack((x - side * ring[:, 0], np.full(12, y), radius + ring[:, 1]), 1), colour, 0))
    return faces


def _wheels(xs, half, radius):
    return [face for x in xs for side in (-1, 1) for face in _wheel(x, side * (half + .01), radius, (side,))]


# ---- the fourteen classes ------------------------------------------------------------------------------------------
def _lamps(body, up=.5):
    """Headlights, tail lights, and number plates; `up` says how high, as a share of the body."""
    front, _, back = body[:3]
    return [_pane(f, u, u + w, v * up, v * up + .32 * up + .04, c)
            for f, colour in ((front, (250, 248, 225)), (back, (196, 24, 22)))
            for u, w, v, c in ((.04, .2, 1, colour), (.76, .2, 1, colour), (.36, .28, .4, (226, 228, 226)))]


def _car(colour, length, width, height, belt, bonnet, boot, rakes, *, cargo=False):
    """Lower body and cabin; rakes: how far windscreen, rear window and sides lean, in metres."""
    half, w = length / 2, width / 2
    body = _solid(rect(-half, half, w), rect(-half + .06, half - .15, w - .04), .2, belt, colour)
    body += _lamps(body) + _wheels((-.3 * length, .31 * length), w, .33 if height < 1.6 else .37)
    front, rear, side = rakes
    cabin = _solid(rect(-half + boot, half - bonnet, w - .05),
                   rect(-half + boot + rear, half - bonnet - front, w - side), belt, height, colour)
    ahead, left, behind, right, roof = cabin
    cabin += [_pane(ahead, .05, .95, .08, .92, (70, 86, 102)), _pane(behind, .1, .9, .15, .88, GLASS)]
    # u runs forward on the right side and backward on the left one
    for face, spans in ((left, ((.06, .44), (.5, .94))), (right, ((.06, .5), (.56, .94)))):
        spans = (((.04, .3),) if face is left else ((.7, .96),)) if cargo else spans
        cabin += [_pane(face, *span, .14, .88, GLASS) for span in spans]
    return [body, cabin]


def sedan(rng, colour=None):
    return _car(_paint(rng) if colour is None else colour, rng.uniform(4.5, 4.9), 1.82, 1.45, .84, 1.2, .75,
                (.75, .65, .26))


def suv(rng):
    colour = _paint(rng)
    length = rng.uniform(4.5, 4.8)
    rails = [_line(DARK, .06, (-.36 * length, y, 1.8), (.06 * length, y, 1.8)) for y in (-.66, .66)]
    return [*_car(colour, length, 1.92, 1.76, 1.02, 1.1, .12, (.6, .25, .2)), rails]


def van(rng):
    colour = PAINTS[rng.choice([0, 0, 0, 2, 1])]
    return _car(colour, rng.uniform(5.0, 5.4), 1.98, 2.15, 1.05, .55, .05, (.75, .1, .12), cargo=rng.random() < .6)


def taxi(rng):
    colour = ((246, 190, 28), (240, 120, 24))[rng.integers(2)]
    body, cabin = sedan(rng, colour)
    body += [_pane(f, .02, .98, .5, .68, (30, 30, 30)) for f in (body[1], body[3])]
    sign = _box(-.45, -.15, .35, 1.45, 1.68, (250, 244, 200))
    sign += [_pane(f, .1, .9, .3, .75, (200, 40, 30)) for f in (sign[0], sign[2])]
    return [body, cabin, sign]


def bus(rng):
    colour = ((38, 92, 176), (44, 140, 74), (198, 44, 40), (226, 228, 230))[rng.integers(4)]
    length = rng.uniform(9.5, 11.)
    half, w = length / 2, 1.25
    body = _solid(rect(-half, half, w), rect(-half, half - .12, w - .05), .3, 3.05, colour)
    front, left, back, right, roof = body
    body += [_pane(roof, .01, .99, .04, .96, (222, 224, 226)), _pane(front, .04, .96, .34, .9, (70, 86, 102))]
    body += [_pane(front, .2, .8, .92, .99, (250, 170, 40)), _pane(back, .12, .88, .5, .88, GLASS)]
    for face in (left, right):
        body.append(_pane(face, .01, .99, .14, .2, (240, 240, 240)))
        body += [_pane(face, u + .012, u + .118, .46, .86, GLASS) for u in np.linspace(.02, .855, 8)]
    body += _lamps(body, .16) + _wheels((-.3 * length, .3 * length), w, .5)
    cooler = _box(-.12 * length, .12 * length, .75, 3.05, 3.3, (196, 198, 200))
    return [body, cooler]


def school_bus(rng):
    yellow, black = (250, 186, 18), (24, 24, 22)
    half, w = rng.uniform(3.7, 4.2), 1.15
    body = _solid(rect(-half, half - 1.3, w), rect(-half, half - 1.45, w - .1), .35, 2.85, yellow)
    front, left, back, right, roof = body
    body += [_pane(front, .06, .94, .42, .86, (70, 86, 102)), _pane(back, .14, .86, .5, .86, GLASS)]
    body += [_pane(roof, u, u + .03, .03, .97, (226, 168, 16)) for u in (.2, .4, .6, .8)]
    for face in (left, right):
        body += [_pane(face, 0, 1, v, v + .05, black) for v in (.16, .38)]
        body += [_pane(face, u + .012, u + .13, .52, .8, GLASS) for u in np.linspace(.02, .84, 6)]
    body += _wheels((-.52 * half, .45 * half), w, .46)
    bonnet = _solid(rect(half - 1.3, half, .95), rect(half - 1.3, half - .2, .9), .35, 1.45, yellow)
    bonnet += _lamps(bonnet)
    bonnet += [_pane(f, 0, 1, .4, .5, black) for f in (bonnet[1], bonnet[3])] + _wheels((half - .6,), .98, .44)
    lights = [_box(x - .12, x + .12, .14, 2.85, 3.05, (220, 30, 24), y) for x in (-half + .3, half - 1.8)
              for y in (-.75, .75)]
    return [body, bonnet, *lights]


def truck(rng):
    colour = ((36, 84, 160), (234, 234, 230), (40, 120, 90), (180, 40, 36))[rng.choice(4, p=(.45, .3, .15, .1))]
    length = rng.uniform(5.4, 7.2)
    half, w = length / 2, 1.
    cab = _solid(rect(half - 1.65, half, w - .05), rect(half - 1.6, half - .35, w - .15), .35, 2.15, colour)
    front, left, _, right = cab[:4]
    cab += [_pane(front, .06, .94, .48, .92, (70, 86, 102)), *_lamps(cab, .24)[:3]]
    cab += [_pane(f, u, u + .5, .5, .88, GLASS) for f, u in ((left, .12), (right, .38))]
    cab += _wheels((half - .8,), w, .4)
    frame = _box(-half, half - 1.7, w - .15, .4, .75, DARK) + _wheels((-.25 * length,), w, .42)
    if rng.random() < .45:                                # a closed body
        load = _box(-half, half - 1.8, w + .08, .78, rng.uniform(2.4, 2.8), (222, 224, 222))
        load += [_pane(load[2], u, u + .44, .05, .95, (200, 203, 204)) for u in (.04, .52)]
        return [frame, cab, load]
    bed = _box(-half, half - 1.8, w + .05, .75, 1.2, colour)     # the floor of the bed is painted on its lid
    bed.append(_pane(bed[4], .03, .97, .06, .94, (104, 92, 78)))
    crates = [_box(x * half, x * half + .8, .35, 1.2, rng.uniform(1.35, 1.9), colour, y) for x, y, colour in
              ((-.8, .45, (176, 138, 92)), (-.8, -.4, (64, 116, 160)), (-.35, .1, (150, 60, 50))) if rng.random() < .6]
    return [frame, cab, bed, *crates]


def _person(rng, tall, head, clothes):
    """Legs and arms swing in step."""
    skin, hair = (226, 180, 150), ((34, 28, 26), (60, 44, 34))[rng.integers(2)]
    trousers = ((40, 46, 66), (30, 30, 32), (120, 104, 84), (84, 88, 96))[rng.integers(4)]
    step, hip, neck = rng.uniform(-.2, .2) * tall, .48 * tall, tall - head
    w = .13 * tall
    legs = [_solid(rect(s * step - .07, s * step + .1, .055 * tall, s * .06 * tall),
                   rect(-.08, .08, .055 * tall, s * .06 * tall), 0, hip, trousers) for s in (-1, 1)]
    torso = _solid(rect(-.1, .1, .8 * w), rect(-.11, .11, w), hip, neck, clothes)
    arms = []
    for s in (-1, 1):
        elbow, hand = (-s * step * .6, s * (w + .05), hip + .06), (-s * step, s * (w + .05), hip - .05)
        arms.append([_line(clothes, .05 * tall, (0, s * w, neck - .04), elbow), _line(skin, .045 * tall, elbow, hand)])
    face = _solid(_ring(.02, 0, .36 * head), _ring(.02, 0, .44 * head), neck, tall - .4 * head, skin)
    cap = _solid(_ring(0, 0, .46 * head), _ring(0, 0, .25 * head), tall - .4 * head, tall, hair)
    return [*legs, torso, *arms, face, cap]


def adult(rng):
    colours = ((196, 52, 48), (44, 76, 140), (236, 232, 222), (44, 46, 50), (110, 120, 84), (180, 150, 60))
    return _person(rng, rng.uniform(1.58, 1.86), .25, colours[rng.integers(6)])


def child(rng):
    colours = ((250, 208, 40), (240, 110, 150), (60, 180, 220), (240, 80, 50))
    parts = _person(rng, rng.uniform(1.0, 1.3), .25, colour := colours[rng.integers(4)])
    return [*parts, _box(-.28, -.12, .13, .55, .85, tuple(c // 2 for c in colour))]      # and a school bag


def motorcycle(rng):
    colour = ((196, 36, 32), (28, 60, 140), (30, 30, 32), (230, 130, 24))[rng.integers(4)]
    wheels = [_wheel(x, 0, .31) for x in (-.68, .68)]
    body = _solid(rect(-.6, .55, .16), rect(-.45, .4, .12), .3, .72, colour)
    seat = _solid(rect(-.75, -.02, .15), rect(-.7, -.05, .13), .72, .84, (26, 26, 28))
    tank = _solid(rect(0, .45, .17), rect(.05, .35, .12), .72, .95, colour)
    fork = [_line(STEEL, .08, (.68, 0, .31), (.45, 0, .98)), _line(DARK, .06, (.4, -.38, 1.08), (.4, .38, 1.08)),
            _line((250, 248, 225), .16, (.5, -.05, .9), (.5, .05, .9))]
    box = [_box(-1.05, -.55, .24, .86, 1.28, ((220, 40, 40), (40, 40, 44), (60, 190, 180))[rng.integers(3)])]
    return [*wheels, body, seat, tank, fork, *(box if rng.random() < .6 else [])]


def kickboard(rng):
    colour = ((90, 210, 60), (30, 32, 34), (250, 170, 30), (150, 70, 200))[rng.integers(4)]
    deck = _box(-.5, .42, .1, .1, .17, colour) + [face for x in (-.5, .5) for face in _wheel(x, 0, .11, hub=DARK)]
    stem = [_line(DARK, .07, (.46, 0, .15), (.36, 0, 1.08)), _line(TYRE, .06, (.35, -.27, 1.1), (.35, .27, 1.1)),
            _line(colour, .08, (.43, 0, .45), (.39, 0, .8))]
    return [deck, stem]


def bicycle(rng):
    colour = ((210, 40, 40), (40, 110, 200), (240, 240, 236), (30, 150, 90))[rng.integers(4)]
    wheels = [[_line(TYRE, .055, *np.stack((x + r[:, 0], np.zeros(17), .34 + r[:, 1]), 1)),
               _line(STEEL, .03, (x - .3, 0, .34), (x + .3, 0, .34)), _line(STEEL, .03, (x, 0, .04), (x, 0, .64))]
              for x in (-.52, .52) for r in (_ring(0, 0, .32, 16)[np.arange(17) % 16],)]
    hub, crank, saddle, head, front = (-.52, 0, .34), (-.08, 0, .32), (-.22, 0, .82), (.36, 0, .84), (.52, 0, .34)
    frame = [_line(colour, .055, *p) for p in ((hub, crank, saddle, hub), (crank, head, saddle), (head, front))]
    top = [_line(TYRE, .1, (-.34, 0, .88), (-.12, 0, .88)), _line(STEEL, .05, head, (.34, 0, .98)),
           _line(DARK, .05, (.3, -.28, 1.), (.36, 0, .98), (.3, .28, 1.))]
    return [*wheels, frame, top]


def stroller(rng):
    colour = ((220, 60, 90), (50, 90, 160), (60, 64, 70), (90, 170, 160))[rng.integers(4)]
    dark = tuple(c // 2 for c in colour)
    wheels = [[*_wheel(x, y, .12, hub=DARK)] for x in (-.35, .35) for y in (-.24, .24)]
    legs = [_line(STEEL, .045, (-s * .35, y, .12), (s * .3, y, .5)) for s in (-1, 1) for y in (-.22, .22)]
    tub = _solid(rect(-.3, .3, .2), rect(-.35, .45, .24), .42, .68, dark)
    tub.append(_pane(tub[4], .5, .95, .1, .9, (238, 226, 206)))
    hood = _solid(rect(-.38, .1, .26), rect(-.26, -.02, .22), .68, 1.02, colour)
    handle = [_line(TYRE, .05, (-.36, -.2, .66), (-.62, -.2, 1.), (-.62, .2, 1.), (-.36, .2, .66))]
    return [*wheels, legs, tub, hood, handle]


def cart(rng):
    bar = ((210, 30, 40), (30, 80, 180), (240, 150, 20))[rng.integers(3)]
    wheels = [[*_wheel(x, y, .08, hub=DARK)] for x in (-.38, .38) for y in (-.2, .2)]
    legs = [_line(STEEL, .05, *p) for y in (-.2, .2)
            for p in (((.38, y, .12), (-.38, y, .16), (-.48, y, .98)), ((-.38, y, .16), (.3, y, .55)))]
    basket = _solid(rect(-.4, .42, .2), rect(-.48, .56, .29), .5, .92, (120, 124, 128))
    wires = [_pane(f, u, u + .05, .02, 1, (222, 226, 230)) for f in basket[:4] for u in np.linspace(0, .95, 6)]
    wires += [_pane(f, 0, 1, v, v + .1, (222, 226, 230)) for f in basket[:4] for v in (.0, .45, .9)]
    load = _pane(basket[4], .06, .94, .1, .9, ((86, 90, 94), (176, 138, 92), (70, 140, 70))[rng.integers(3)])
    return [*wheels, legs, [*basket, *wires, load], [_line(bar, .08, (-.52, -.28, 1.), (-.52, .28, 1.))]]


def _paint(rng):
    return PAINTS[rng.choice(len(PAINTS), p=(.28, .18, .16, .14, .09, .06, .05, .04))]


MODELS = (sedan, suv, van, bus, school_bus, truck, taxi, adult, child, motorcycle, kickboard, bicycle, stroller, cart)


def tree(rng):
    green = np.array((62, 104, 48)) * rng.uniform(.75, 1.15)
    r, z = rng.uniform(1., 1.6), rng.uniform(1.2, 1.8)
    crown = [_solid(_ring(0, 0, a * r), _ring(0, 0, b * r), z + c * r, z + d * r, green * e)
             for a, b, c, d, e in ((.6, 1., 0, .5, .7), (1., .85, .5, 1.1, .9), (.85, .3, 1.1, 1.7, 1.1))]
    return [_solid(_ring(0, 0, .16, 6), _ring(0, 0, .12, 6), 0, z, (84, 64, 48)), *crown]


def lamp_post(rng):
    return [[_line((120, 124, 128), .14, (0, 0, 0), (0, 0, 6.5), (1.2, 0, 6.7))],
            [_line((220, 220, 210), .25, (.9, 0, 6.68), (1.5, 0, 6.7))]]
