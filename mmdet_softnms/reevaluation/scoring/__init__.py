"""Settings to numbers: suppression of stored candidates and metrics of the detections."""
