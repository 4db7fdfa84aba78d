"""``python -m pipeline.tracking``: send all records that wait to MLflow."""

from pipeline.tracking.mlflow_runs import send_waiting, store_uri

print(f"sent {send_waiting()} records to {store_uri()}")
