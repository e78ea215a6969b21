"""What the drawn world is made of: shapes, colours, words, and where things lie in a picture."""

import string
from dataclasses import dataclass, field

from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 45),
    "purple": (150, 50, 185),
    "orange": (240, 135, 30),
    "cyan": (45, 205, 215),
    "white": (245, 245, 245),
}
NUMBERS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
CHARACTERS = string.digits + string.ascii_uppercase
# A to D name the options of a question, I, O and Q look like other characters.
BOX_LETTERS = "EFGHJKLMNPRSTUVWXYZ"

_LEXICON = """
ARM ART AXE BAG BAR BAT BAY BED BEE BELL BIKE BIRD BOAT BONE BOOK BOOT BOWL BOX BUS CAFE CAKE
CAR CAT CITY CLAY COAL COAT COLD COOK CORN COW CUP DARK DAY DEER DESK DOG DOOR DRUM DUCK DUST
EAR EAST EGG EXIT EYE FARM FAST FIG FIRE FISH FLAG FOOD FORK FOX FROG GATE GIFT GLUE GOAT
GOLD GYM HALL HAND HAT HEN HILL HOME HOT HUT ICE INK IRON JAM JAR JET JUMP KEY KID KING KITE
LAKE LAMB LAMP LEAF LID LIME LION MAP MASK MILK MOON MUD NEST NET NUT OAK OIL OPEN OWL
PAN PARK PEA PEN PIG PLUM POND POT PUSH QUIZ RAIN RAT RICE RING ROAD ROCK ROPE ROSE SALT SAND
SHIP SHOP SIGN SILK SKY SNOW SOAP SOUP STOP SUN TAXI TEA TENT TOP TOY TREE TUB VAN VASE WALL
WAVE WEB WEST WIND WOLF WOOD YARD YAK ZERO ZOO
"""
WORDS = tuple(_LEXICON.split())
TEST_WORDS = WORDS[::4]  # on the signs of the data sets only: training never shows them
TRAIN_WORDS = tuple(w for w in WORDS if w not in TEST_WORDS)

CENTRE_BAND = 0.06  # of the picture's side: a thing this near the middle is on neither side


def plural(shape: str) -> str:
    """`cross` -> `crosses`, `star` -> `stars`."""
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True)
class Thing:
    """A coloured shape, or a lettered box of a diagram, somewhere in a picture."""

    name: str  # the shape's name or the box's letter
    color: str
    x: float
    y: float
    side: str | None  # "left", "right", or None near the middle
    height: str | None  # "top", "bottom", or None near the middle
    target: str | None = None  # the letter of the box its arrow points to


def locate(x: float, y: float, width: int, height: int) -> tuple[str | None, str | None]:
    """Name the half of the picture a point lies in, on both axes."""

    def half(value: float, size: int, names: tuple[str, str]) -> str | None:
        offset = value / size - 0.5
        return None if abs(offset) < CENTRE_BAND else names[offset > 0]

    return half(x, width, ("left", "right")), half(y, height, ("top", "bottom"))


@dataclass
class Picture:
    """One drawn image and everything a question may ask about it."""

    image: Image.Image
    shapes: list[Thing] = field(default_factory=list)
    boxes: list[Thing] = field(default_factory=list)  # in the order of their arrows
    sign: str | None = None
    # Where the ink is, for the labels of a patch: one byte per pixel, 0 is background.
    ink: Image.Image | None = None  # 1 + index into `shapes` or `boxes`; 255 for arrows and signs
    letters: list[tuple[str, int, float, float]] = field(default_factory=list)
    # ^ (character, its place in its own text, x, y)

    def named(self, name: str) -> list[Thing]:
        return [t for t in self.shapes if t.name == name]

    def colored(self, color: str) -> list[Thing]:
        return [t for t in self.shapes if t.color == color]

    def single(self) -> list[Thing]:
        """Shapes whose name nothing else in the picture has."""
        return [t for t in self.shapes if len(self.named(t.name)) == 1]
