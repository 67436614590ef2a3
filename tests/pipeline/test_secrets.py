"""What is kept from sight, and what is not."""

import pytest

from pipeline.secrets import is_secret_name, mask, mask_settings


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ftp://me:hunter2@host/photos", "ftp://me:***@host/photos"),
        ("s3://AKIA1:ab/cd+ef@bucket/key", "s3://AKIA1:***@bucket/key"),
        ("https://ghp_token@host/x.csv", "https://***@host/x.csv"),
        (
            "https://h/x.jpg?size=2&X-Amz-Signature=abc&X-Amz-Date=1",
            "https://h/x.jpg?size=2&X-Amz-Signature=***&X-Amz-Date=***",
        ),
        ("https://a.blob.net/c?sv=2024&sig=a%2Fb", "https://a.blob.net/c?sv=2024&sig=***"),
        ("tar://a.jpg::https://u:p@h/x.tar", "tar://a.jpg::https://u:***@h/x.tar"),
        ("HF_TOKEN=abc nightshift label x", "HF_TOKEN=*** nightshift label x"),
        ("headers: Authorization: Bearer 0123456789abcdef", "headers: Authorization: Bearer ***"),
        ("cannot read 'ftp://me:hunter2@host/x': refused", "cannot read 'ftp://me:***@host/x': refused"),
    ],
)
def test_secrets_are_masked_wherever_they_stand_in_a_text(text, masked):
    assert mask(text) == masked
    assert mask(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "s3://anonymous@bucket/photos/*.jpg",
        "s3://bucket/a.jpg?versionId=7",
        "http://host:8080/photo@2x.png",
        "tar://a:b/c@2x.jpg::/photos/x.tar",
        "/photos/a=b/token.jpg",
        "RAY_AUTH_MODE=token",
        "max_retries=3",
        "--model my_net:make -o out",
        "12 of 20 images are done and kept; the same command continues",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text):
    assert mask(text) == text


def test_address_that_is_signed_anew_is_the_same_place():
    signed = "https://h/x.jpg?X-Amz-Date=20260101T000000Z&X-Amz-Signature=aaa"
    again = "https://h/x.jpg?X-Amz-Date=20260102T000000Z&X-Amz-Signature=bbb"
    other = "https://h/y.jpg?X-Amz-Date=20260101T000000Z&X-Amz-Signature=aaa"
    assert mask(signed) == mask(again) != mask(other)


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("dbPassword", True),
        ("WANDB_API_KEY", True),
        ("AWS_REGION", False),
        ("RAY_AUTH_MODE", False),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("MONKEY", False),
        ("TOKENIZERS_PARALLELISM", False),
    ],
)
def test_names_tell_secrets(name, is_secret):
    assert is_secret_name(name) is is_secret


def test_settings_are_masked_by_name_and_by_content_and_keep_their_shape():
    settings = {"inputs": ("ftp://u:p@h/x",), "env": {"HF_TOKEN": "abc", "N": "1"}, "top_k": 5, "mean": None}
    masked = {"inputs": ("ftp://u:***@h/x",), "env": {"HF_TOKEN": "***", "N": "1"}, "top_k": 5, "mean": None}
    assert mask_settings(settings) == masked
