"""What the protocol of every report says, for reports that are made by hand and saved."""

PROTOCOL = {
    "architecture": "hpm_wrn10_2", "weights_digest": "0" * 16, "data_digest": "0123456789abcdef",
    "threat": "Linf:8/255", "num_images": 10, "num_classes": 10, "batch_size": 10, "inference": "batch", "mix": 0.5,
    "prototypes_fitted": True, "seed": 0, "device": "cpu", "versions": {"torch": "2.14.1"}, "surrogates": ["fc", "ste"],
    "attacks": {"apgd-ce": {"iterations": 100}, "apgd-t": {"iterations": 100, "targets": 9},
                "fab-t": {"iterations": 100, "targets": 9}, "square": {"iterations": 5000}},
}
