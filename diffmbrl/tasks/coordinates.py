"""Names and units of the numbers of states and actions, for the table of tasks."""

PENDULUM = ("angle [rad]", "rate [rad/s]")
CART = ("x [m]", "angle [rad]", "v [m/s]", "w [rad/s]")
ANGLES = ("first [rad]", "second [rad]", "first rate [rad/s]", "second rate [rad/s]")
REACH = (*ANGLES, "target x [m]", "target y [m]")
ROAD = ("x [m]", "y [m]", "heading [rad]", "speed [m/s]")
PLANE = ("x [m]", "z [m]", "pitch [rad]", "vx [m/s]", "vz [m/s]", "pitch rate [rad/s]")
FLIGHT = (
    *("x [m]", "y [m]", "z [m]", "roll [rad]", "pitch [rad]", "yaw [rad]", "vx [m/s]", "vy [m/s]", "vz [m/s]"),
    *("roll rate [rad/s]", "pitch rate [rad/s]", "yaw rate [rad/s]"),
)
BALL = ("q [m]", "v [m/s]")
WALL = ("wall [m]", "ball [m]")
TWO_BODIES = ("first [m]", "second [m]", "first speed [m/s]", "second speed [m/s]")
COURT = ("ball x [m]", "ball z [m]", "ball vx [m/s]", "ball vz [m/s]", "racket [m]", "tilt [rad]")
SHEET = ("place [m]", "first digit [1]", "second digit [1]")

FORCE = ("force [N]",)
FORCE_300 = ("force [300 N]",)
TWO_TORQUES = ("first torque [N m]", "second torque [N m]")
TWO_THRUSTS = ("left thrust [N]", "right thrust [N]")
THRUST = ("thrust [N]", "roll torque [N m]", "pitch torque [N m]", "yaw torque [N m]")
DRIVE = ("steering [rad]", "acceleration [m/s^2]")
RACKET = ("racket speed [m/s]", "turn [rad/s]")
MOTOR = ("motor [1]",)

LEG, TWO, SWIMS = ("thigh", "shin", "foot"), ("first joint", "second joint"), ("x [m]", "y [m]", "heading [rad]")
LEGS = tuple(f"{leg} {part}" for leg in ("first", "second") for part in LEG)
EIGHT = tuple(f"{joint} {i}" for i in (1, 2, 3, 4) for joint in ("hip", "ankle"))


def with_rates(places: tuple[str, ...]) -> tuple[str, ...]:
    """Return positions and angles, followed by their rates in the same order."""
    return *places, *(x.replace("[m]", "speed [m/s]").replace("[rad]", "rate [rad/s]") for x in places)


def planar(joints: tuple[str, ...], free: tuple[str, ...] = ("x [m]", "z [m]", "pitch [rad]")) -> tuple[str, ...]:
    """Return the state of a runner in a plane, whose last number is the speed that is rewarded."""
    return *with_rates((*free, *(f"{joint} [rad]" for joint in joints))), "forward speed [m/s]"


def motors(joints: tuple[str, ...]) -> tuple[str, ...]:
    """Return one motor per joint, driven by an action from -1 to 1."""
    return tuple(f"{joint} motor [1]" for joint in joints)


CART_AND_TWO = with_rates(("x [m]", "first [rad]", "second [rad]"))
ARM = with_rates(("shoulder [rad]", "elbow [rad]", "target x [m]", "target y [m]"))
FREE_AND_EIGHT = (
    *("x [m]", "y [m]", "z [m]", "quaternion w", "quaternion x", "quaternion y", "quaternion z"),
    *(f"{joint} [rad]" for joint in EIGHT),
    *("x speed [m/s]", "y speed [m/s]", "z speed [m/s]", "roll rate [rad/s]", "pitch rate [rad/s]", "yaw rate [rad/s]"),
    *(f"{joint} rate [rad/s]" for joint in EIGHT),
    "forward speed [m/s]",
)
