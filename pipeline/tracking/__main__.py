"""``python -m pipeline.tracking``: send all records that wait to MLflow."""

from pipeline.tracking.mlflow_runs import send_waiting, store_uri
from pipeline.tracking.work_folders import keep_private

keep_private()
print(f"sent {send_waiting()} records to {store_uri()}")
