"""A small tokenizer for stand-in models: byte-level BPE, trained on the text below.

It behaves as the real one does wherever the model's vectors depend on it: the same normalisation and splitting, any
text can be encoded, the same special tokens in the same order, and the image prompt is as many tokens long.
"""
# ruff: noqa: RUF001 - the text is in many scripts, whose letters may look alike

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_N_PLAIN_TOKENS = 1000
# How Qwen2 cuts text into words before BPE.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The model's own prompts, often enough that each word of theirs becomes one token.
_PROMPTS = ["user\nDescribe the image.\n", "Query: the image", "Passage: the image"] * 50
_TEXT = [
    "The lighthouse on the northern cape was built of grey stone, and its light can be seen from thirty miles away.",
    "A good answer names the question it answers, gives the number with its unit and says how it was measured.",
    "Coastal cities are raising their dikes because the sea is rising and storms are getting stronger every year.",
    "Which documents describe the effects of climate change on the harbour, the beach and the fishing villages?",
    "The invoice lists twelve items: four chairs, two tables, one lamp, three boxes of paper and two bottles of ink.",
    "A chart with blue and orange bars shows how many people read the newspaper in the morning and in the evening.",
    "Search engines compare vectors: the closer two vectors point in the same direction, the more alike the texts are.",
    "She wrote a short letter about the garden, the weather, the neighbours and the little brown dog at the gate.",
    "The train leaves platform seven at nine and arrives before noon; bring warm clothes, some bread and a map.",
    "Der Leuchtturm steht auf einer kleinen Insel, und sein Licht ist bei klarem Wetter weit über das Meer zu sehen.",
    "Welche Unterlagen beschreiben die Folgen der steigenden Temperaturen für die Städte an der Küste?",
    "Le phare se trouve sur une petite île, et sa lumière se voit de très loin quand le temps est clair.",
    "Quels sont les documents qui décrivent les conséquences de la montée des eaux pour les villes du littoral ?",
    "El faro está en una isla pequeña y su luz se ve desde muy lejos cuando el cielo está despejado.",
    "Una tabla compara los precios de las manzanas, las naranjas y el pan en las tiendas de la ciudad.",
    "O farol fica numa ilha pequena, e a sua luz vê-se de muito longe quando o céu está limpo.",
    "Il faro si trova su una piccola isola e la sua luce si vede da molto lontano quando il cielo è sereno.",
    "De vuurtoren staat op een klein eiland en het licht is bij helder weer van heel ver te zien.",
    "Latarnia morska stoi na małej wyspie, a jej światło widać z daleka, kiedy niebo jest czyste.",
    "Deniz feneri küçük bir adada durur ve hava açıkken ışığı çok uzaktan görülür.",
    "Маяк стоит на маленьком острове, и в ясную погоду его свет виден очень далеко с моря.",
    "Какие документы описывают влияние изменения климата на города у моря?",
    "Ο φάρος βρίσκεται σε ένα μικρό νησί και το φως του φαίνεται από πολύ μακριά.",
    "المنارة على جزيرة صغيرة، ويمكن رؤية ضوئها من بعيد جدا عندما تكون السماء صافية.",
    "המגדלור עומד על אי קטן, ואפשר לראות את האור שלו ממרחק רב כשהשמיים בהירים.",
    "प्रकाशस्तंभ एक छोटे द्वीप पर है और साफ मौसम में उसकी रोशनी बहुत दूर से दिखाई देती है।",
    "灯塔建在一个小岛上，天气晴朗的时候，很远的地方都能看到它的光。",
    "哪些文件说明了气候变化对沿海城市的影响？",
    "灯台は小さな島の上にあり、晴れた日にはその光がとても遠くから見えます。",
    "気候の変化が海辺の町に与える影響を説明している文書はどれですか。",
    "등대는 작은 섬 위에 있으며, 맑은 날에는 그 빛이 아주 멀리서도 보입니다.",
    "Ngọn hải đăng nằm trên một hòn đảo nhỏ, ánh sáng của nó có thể nhìn thấy từ rất xa.",
    "ประภาคารตั้งอยู่บนเกาะเล็กๆ และมองเห็นแสงได้จากที่ไกลมาก",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n",
    "for index, name in enumerate(names):\n    print(index, name)\n    total = total + len(name)\n",
    "class Counter:\n    def __init__(self, start=0):\n        self.value = start\n\n    def add(self, n):\n"
    "        self.value += n\n        return self.value\n",
    "async function load(url) {\n  const response = await fetch(url);\n  return response.json();\n}\n",
    "SELECT name, count(*) FROM visits WHERE year = 2024 GROUP BY name ORDER BY count(*) DESC;\n",
    "fn main() {\n    let words: Vec<&str> = text.split(' ').collect();\n    println!(\"{}\", words.len());\n}\n",
]

# As published: it renders any chat, unlike the one that a fold puts into a checkpoint.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
)


def tokenizer_files() -> tuple[dict[str, bytes], dict[str, int]]:
    """Train the tokenizer; the same bytes each time.

    Returns:
        Its files by name, and the id of each special token.
    """
    tokenizer = _train()
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    added = {
        str(ids[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    named = {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **named,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2TokenizerFast",
        "unk_token": None,
    }
    files: dict[str, object] = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": named,
        "chat_template.json": {"chat_template": _CHAT_TEMPLATE},
        "vocab.json": model["vocab"],
    }
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    return {
        "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode(),
        "merges.txt": merges.encode(),
        **{
            name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in files.items()
        },
    }, ids


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_N_PLAIN_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_PROMPTS + _TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
