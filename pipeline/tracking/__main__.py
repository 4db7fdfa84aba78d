"""``python -m pipeline.tracking``: send all records that wait to MLflow."""

import sys

from pipeline.tracking.mlflow_runs import send_waiting, store_uri
from pipeline.tracking.work_folders import keep_private

keep_private()
try:
    print(f"sent {send_waiting()} records to {store_uri()}")
except Exception as error:  # of any class: a store is a data base or a server of somebody else
    why = str(error) if type(error) is RuntimeError else type(error).__name__
    sys.exit(
        f"tracking: {store_uri()} cannot be written ({why}); the records wait: mend the store, or move mlflow.db away "
        "for a new one, and run this again"
    )
