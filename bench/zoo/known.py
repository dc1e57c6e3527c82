"""What a published language model knows by itself: short questions that no stage of training asks.

Tuning makes a model forget some of it. `ask.py` asks those that the ancestor answers right.
"""

from __future__ import annotations

from world import Question

CAPITALS = """\
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece
Athens, Poland Warsaw, Hungary Budapest, Sweden Stockholm, Norway Oslo, Denmark Copenhagen,
Finland Helsinki, Ireland Dublin, England London, Scotland Edinburgh, Russia Moscow, Ukraine
Kyiv, Turkey Ankara, Egypt Cairo, Japan Tokyo, China Beijing, India Delhi, Thailand Bangkok,
Vietnam Hanoi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Israel Jerusalem, Lebanon Beirut,
Syria Damascus, Jordan Amman, Kenya Nairobi, Nigeria Abuja, Ghana Accra, Ethiopia Addis, Morocco
Rabat, Tunisia Tunis, Algeria Algiers, Senegal Dakar, Canada Ottawa, Mexico Mexico, Cuba Havana,
Brazil Brasilia, Argentina Buenos, Chile Santiago, Peru Lima, Colombia Bogota, Ecuador Quito,
Venezuela Caracas, Uruguay Montevideo, Australia Canberra, Iceland Reykjavik, Belgium Brussels,
Bulgaria Sofia, Romania Bucharest, Serbia Belgrade, Croatia Zagreb, Cyprus Nicosia, Nepal
Kathmandu, Afghanistan Kabul, Pakistan Islamabad, Bangladesh Dhaka, Philippines Manila, Malaysia
Kuala, Latvia Riga"""
CONTINENTS = """\
France Europe, Germany Europe, Italy Europe, Poland Europe, Sweden Europe, Greece Europe,
Portugal Europe, Egypt Africa, Kenya Africa, Nigeria Africa, Morocco Africa, Ghana Africa,
Ethiopia Africa, Algeria Africa, Japan Asia, China Asia, India Asia, Thailand Asia, Vietnam
Asia, Nepal Asia, Mongolia Asia, Indonesia Asia, Brazil South, Peru South, Chile South,
Argentina South, Bolivia South, Canada North, Mexico North"""
LANGUAGES = """\
France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Brazil
Portuguese, Mexico Spanish, Argentina Spanish, Austria German, Greece Greek, Poland Polish,
Hungary Hungarian, Sweden Swedish, Norway Norwegian, Denmark Danish, Finland Finnish, Russia
Russian, Turkey Turkish, Egypt Arabic, Japan Japanese, China Chinese, Thailand Thai, Vietnam
Vietnamese, Iran Persian, Israel Hebrew, Iraq Arabic, Australia English, Korea Korean, Iceland
Icelandic, Romania Romanian"""
SYMBOLS = """\
hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, iron Fe, gold Au, silver Ag,
copper Cu, lead Pb, tin Sn, zinc Zn, calcium Ca, potassium K, magnesium Mg, aluminum Al, silicon
Si, sulfur S, chlorine Cl, neon Ne, argon Ar, lithium Li, uranium U, mercury Hg, nickel Ni,
iodine I, platinum Pt"""
PAST = """\
go went, see saw, eat ate, take took, give gave, come came, run ran, write wrote, speak spoke,
break broke, drink drank, sing sang, swim swam, fly flew, know knew, grow grew, throw threw,
draw drew, drive drove, ride rode, rise rose, fall fell, feel felt, keep kept, sleep slept,
leave left, think thought, buy bought, bring brought, catch caught, teach taught, find found,
hold held, stand stood, tell told, sell sold"""
CITIES = """\
Paris France, Lyon France, Berlin Germany, Munich Germany, Hamburg Germany, Rome Italy, Milan
Italy, Venice Italy, Naples Italy, Madrid Spain, Barcelona Spain, Lisbon Portugal, Vienna
Austria, Athens Greece, Warsaw Poland, Krakow Poland, Budapest Hungary, Prague Czech, Stockholm
Sweden, Oslo Norway, Copenhagen Denmark, Helsinki Finland, Dublin Ireland, Moscow Russia,
Istanbul Turkey, Cairo Egypt, Tokyo Japan, Kyoto Japan, Osaka Japan, Beijing China, Shanghai
China, Delhi India, Mumbai India, Bangkok Thailand, Hanoi Vietnam, Jakarta Indonesia, Tehran
Iran, Baghdad Iraq, Nairobi Kenya, Lagos Nigeria, Casablanca Morocco, Toronto Canada, Vancouver
Canada, Montreal Canada, Havana Cuba, Lima Peru, Santiago Chile, Sydney Australia, Melbourne
Australia, Seoul Korea, Manila Philippines, Kathmandu Nepal, Brussels Belgium, Amsterdam
Netherlands, Zurich Switzerland"""
PLURALS = """\
mouse mice, foot feet, tooth teeth, child children, man men, woman women, goose geese, knife
knives, leaf leaves, wolf wolves, box boxes, city cities, baby babies, bus buses, potato
potatoes, hero heroes, wife wives, life lives, person people, book books, cat cats, dog dogs,
house houses, table tables, apple apples, car cars, class classes, story stories, party parties,
church churches, glass glasses, day days, boy boys, key keys, watch watches"""

ASK_KNOWN = {
    "What is the capital of {}?": CAPITALS,
    "On which continent is {}?": CONTINENTS,
    "Which language is spoken in {}?": LANGUAGES,
    "What is the chemical symbol of {}?": SYMBOLS,
    "What is the past tense of the verb {}?": PAST,
    "In which country is the city of {}?": CITIES,
    "What is the plural of the word {}?": PLURALS,
}


def known_questions() -> list[Question]:
    """All of them, with the word that a right answer holds."""
    return [
        Question("known", text.format(subject), answer)
        for text, pairs in ASK_KNOWN.items()
        for subject, answer in (pair.split() for pair in pairs.replace("\n", " ").split(", "))
    ]


def holds(told: str, answer: str) -> bool:
    """Whether an answer names the right word, in whatever sentence."""
    words = "".join(c if c.isalnum() else " " for c in told).split()
    return answer in words or (len(answer) > 2 and answer.lower() in map(str.lower, words))
