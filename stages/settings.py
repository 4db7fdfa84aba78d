"""Stage ``settings``: params.yaml -> data/settings, what each other stage reads of it."""

from pipeline.config.checks import check_stamps
from pipeline.config.load import load_params
from pipeline.config.settings import write_settings
from stages import run


def main() -> None:
    params = load_params()
    check_stamps(params.sources)  # before anything runs
    print(f"settings: {write_settings(params)} files")


if __name__ == "__main__":
    run("settings", main)
