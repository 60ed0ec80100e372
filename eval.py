"""Evaluate SSD300 on the TEST lists: average precision by class, their mean (VOC07 mAP), images a second.

    python eval.py
    python eval.py --checkpoint=best_checkpoint_ssd300.pth.tar --write_detections_to=detections

Reads the TEST lists in `data_folder` and a checkpoint. With --read_detections_from=FOLDER it scores files in
Pascal VOC's format instead, of any detector: no model is needed.
Any parameter below can be overridden on the command line with --name=value.
"""
