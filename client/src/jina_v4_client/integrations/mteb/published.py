"""What others measured with the published weights, for the table that the command prints.

By the name of a task or of a benchmark. In percent: of a task its main score, the mean over its subsets; of a benchmark
the mean over its tasks, and only where the source has every one.

Source: https://github.com/embeddings-benchmark/results, ``results/jinaai__jina-embeddings-v4/REVISION/TASK.json``.
REVISION is the model's, 26239889730c735ed7e9a4db9180c8935faf4ba0, submitted by its maker in 2025. Vidore3HrRetrieval is
of 4a58ca57710c49f51896e4bc820e202fbf64904b, a run of mteb's maintainers in 2026, the multi-vectors in a folder
``experiments/vector_type_multi_vector``.

The files of 2025 do not say whether they are dense. mteb's wrapper of then makes one vector of a text and, from 1.38.35
on, where it first takes images, always multi-vectors of pages. The files of texts (mteb 1.34.20 to 1.38.30) and of
ViDoRe v1 and v2 (1.38.33) name versions older than that, so they were run with code that mteb had not released.

Left out: FiQA2018, as its file names mteb 1.38.37, where the wrapper reads passages with the prompt of a query;
STS22.v2, as the name stands for 18 subsets, or within ``MTEB(eng, v2)`` for one; folder "1", which names no revision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Published:
    """A published score, in percent; None where there is none."""

    dense: float | None = None
    multivector: float | None = None


_DENSE: Final[Mapping[str, float]] = {
    # STS, the text-matching adapter.
    "BIOSSES": 89.2147,
    "SICK-R": 89.2287,
    "STS12": 83.5043,
    "STS13": 88.6082,
    "STS14": 84.7675,
    "STS15": 89.692,
    "STSBenchmark": 88.5762,
    # Retrieval of texts.
    "ArguAna": 66.962,
    "CQADupstackGamingRetrieval": 57.589,
    "CQADupstackUnixRetrieval": 42.945,
    "ClimateFEVERHardNegatives": 34.573,
    "FEVERHardNegatives": 87.689,
    "HotpotQAHardNegatives": 69.006,
    "NFCorpus": 34.439,
    "NQ": 61.68,
    "QuoraRetrieval": 78.628,
    "Touche2020Retrieval.v3": 52.407,
    # Long texts.
    "LEMBNarrativeQARetrieval": 58.708,
    "LEMBSummScreenFDRetrieval": 96.962,
    "LEMBWikimQARetrieval": 87.021,
    # Programming, the code adapter. StackOverflowQA is of another revision of the data than mteb 2.26 has.
    "AppsRetrieval": 76.088,
    "CodeFeedbackST": 85.065,
    "CodeTransOceanDL": 44.194,
    "CosQA": 31.487,
    "StackOverflowQA": 91.429,
    "SyntheticText2SQL": 70.455,
    # Pages: the mean of six languages.
    "Vidore3HrRetrieval": 52.0532,
}

_MULTIVECTOR: Final[Mapping[str, float]] = {
    # ViDoRe v1, of other revisions of the data than mteb 2.26 has, and the mean of its ten tasks.
    "VidoreArxivQARetrieval": 88.464,
    "VidoreDocVQARetrieval": 60.137,
    "VidoreInfoVQARetrieval": 93.793,
    "VidoreShiftProjectRetrieval": 92.934,
    "VidoreSyntheticDocQAAIRetrieval": 99.262,
    "VidoreSyntheticDocQAEnergyRetrieval": 97.262,
    "VidoreSyntheticDocQAGovernmentReportsRetrieval": 96.585,
    "VidoreSyntheticDocQAHealthcareIndustryRetrieval": 99.131,
    "VidoreTabfquadRetrieval": 95.598,
    "VidoreTatdqaRetrieval": 80.348,
    "ViDoRe(v1)": 90.3514,
    # ViDoRe v2, each the mean of its languages, and the mean of its four tasks.
    "Vidore2BioMedicalLecturesRetrieval": 60.8543,
    "Vidore2ESGReportsHLRetrieval": 65.124,
    "Vidore2ESGReportsRetrieval": 51.821,
    "Vidore2EconomicsReportsRetrieval": 55.1157,
    "ViDoRe(v2)": 58.2287,
    # ViDoRe v3: the mean of six languages.
    "Vidore3HrRetrieval": 59.7573,
    # JinaVDR, the 39 of its 43 tasks that have one subset; "main" stands for the data's revision.
    "JinaVDRArabicChartQARetrieval": 66.638,
    "JinaVDRArabicInfographicsVQARetrieval": 93.169,
    "JinaVDRArxivQARetrieval": 98.727,
    "JinaVDRAutomobileCatelogRetrieval": 81.323,
    "JinaVDRBeveragesCatalogueRetrieval": 88.023,
    "JinaVDRCharXivOCRRetrieval": 87.517,
    "JinaVDRChartQARetrieval": 71.768,
    "JinaVDRDocQAAI": 99.465,
    "JinaVDRDocQAEnergyRetrieval": 97.692,
    "JinaVDRDocQAGovReportRetrieval": 97.227,
    "JinaVDRDocQAHealthcareIndustryRetrieval": 98.609,
    "JinaVDRDocVQARetrieval": 95.426,
    "JinaVDRDonutVQAISynHMPRetrieval": 75.756,
    "JinaVDREuropeanaDeNewsRetrieval": 63.737,
    "JinaVDREuropeanaEsNewsRetrieval": 80.631,
    "JinaVDREuropeanaFrNewsRetrieval": 51.16,
    "JinaVDREuropeanaItScansRetrieval": 73.96,
    "JinaVDREuropeanaNlLegalRetrieval": 60.506,
    "JinaVDRHindiGovVQARetrieval": 22.52,
    "JinaVDRHungarianDocQARetrieval": 75.643,
    "JinaVDRInfovqaRetrieval": 97.067,
    "JinaVDRJDocQARetrieval": 82.168,
    "JinaVDRJina2024YearlyBookRetrieval": 98.175,
    "JinaVDRMMTabRetrieval": 89.91,
    "JinaVDRMPMQARetrieval": 92.395,
    "JinaVDRMedicalPrescriptionsRetrieval": 97.693,
    "JinaVDROWIDChartsRetrieval": 92.433,
    "JinaVDROpenAINewsRetrieval": 96.428,
    "JinaVDRPlotQARetrieval": 78.772,
    "JinaVDRRamensBenchmarkRetrieval": 94.65,
    "JinaVDRShanghaiMasterPlanRetrieval": 97.41,
    "JinaVDRShiftProjectRetrieval": 92.169,
    "JinaVDRStanfordSlideRetrieval": 97.161,
    "JinaVDRStudentEnrollmentSyntheticRetrieval": 11.487,
    "JinaVDRTQARetrieval": 68.207,
    "JinaVDRTabFQuadRetrieval": 95.847,
    "JinaVDRTableVQARetrieval": 89.171,
    "JinaVDRTatQARetrieval": 93.533,
    "JinaVDRWikimediaCommonsMapsRetrieval": 53.229,
}

PUBLISHED: Final[Mapping[str, Published]] = {
    name: Published(_DENSE.get(name), _MULTIVECTOR.get(name)) for name in (*_DENSE, *_MULTIVECTOR)
}


def published(name: str, *, multivector: bool) -> float | None:
    """Give the published score of a task or benchmark, in percent."""
    scores = PUBLISHED.get(name, Published())
    return scores.multivector if multivector else scores.dense
