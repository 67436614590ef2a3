from crafted import PHOTO, encode

from pipeline.models import open_model
from pipeline.picture import label_pictures


def test_libraries_write_nothing_between_the_labels(tmp_path, tiny_model_dir, capfd):
    """libtiff tells stderr of damaged rows, by the hundred."""
    sound, damaged = tmp_path / "sound.tif", tmp_path / "damaged.tif"
    content = bytearray(encode(PHOTO.convert("1").resize((300, 300)), "TIFF", compression="group4"))
    sound.write_bytes(content)
    for place in range(300, len(content) - 300, 37):
        content[place] ^= 0x55
    damaged.write_bytes(content)
    model = open_model(tiny_model_dir, weights="DEFAULT", labels=None, overrides={})
    options = {"precision": "fp32", "top_k": 2, "exif": "ignore", "max_pixels": 10**6, "retries": 0}
    labelled = list(label_pictures([str(sound), str(damaged)], model, **options))
    assert [len(picture.predictions) for picture in labelled] == [2, 2]
    assert capfd.readouterr().err == ""
