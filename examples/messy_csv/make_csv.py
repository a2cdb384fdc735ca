"""Write the example's table: 2,000 customers of a made-up shop, with the faults that such tables have.

python examples/messy_csv/make_csv.py [FILE]    the same rows each time
"""

import argparse
import csv
from datetime import date, timedelta
from pathlib import Path

import numpy as np

FILE = Path("examples/messy_csv/customers.csv")
COLUMNS = ("customer", "signup", "age", "income", "plan", "city", "visits", "left")
PLANS = ("basic", "plus", "pro")
CITIES = ("Aarhus", "Bergen", "Gent", "Lyon", "Porto", "Turku")


def main(file: Path = FILE, rows: int = 2000, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(make_row(number, rows, generator) for number in range(rows))


def make_row(number: int, rows: int, generator: np.random.Generator) -> tuple[object, ...]:
    """One customer. Who left follows from the plan, visits, age and the day of signing up, and from chance."""
    days = int(generator.integers(0, 1500))
    age, income = generator.normal(42, 13), generator.lognormal(10.3, 0.45)
    plan, city = str(generator.choice(PLANS, p=(0.5, 0.3, 0.2))), str(generator.choice(CITIES))
    visits = int(generator.poisson({"basic": 3, "plus": 6, "pro": 9}[plan]))
    is_visits_missing = generator.random() < 0.08
    score = 3.0 - 0.7 * visits + {"basic": 0.0, "plus": 1.5, "pro": 3.0}[plan] + 0.002 * (days - 750)
    score += 0.05 * (42 - age) - 0.00003 * (income - 30000) + 2.0 * is_visits_missing  # a gap tells something too
    left = generator.random() < 1 / (1 + np.exp(-score))
    if generator.random() < 0.01:
        income *= 100  # written in cents
    if number > 0.8 * rows and generator.random() < 0.02:
        city = f"Village {number}"  # seen once
    return (
        f"C{number:05d}",
        (date(2021, 1, 1) + timedelta(days)).isoformat(),
        "" if generator.random() < 0.10 else round(max(18.0, age)),
        "" if generator.random() < 0.05 else round(income, 2),
        "" if generator.random() < 0.03 else plan,
        city,
        "" if is_visits_missing else visits,
        "yes" if left else "no",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    main(parser.parse_args().file)
