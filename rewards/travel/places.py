"""Real countries, cities and sights. Everything with a price or a date is generated in world.py.

Names are ASCII and short: they are copied token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

# Kinds of sight that count as culture, and the others.
CULTURE = ("temple", "church", "museum", "castle", "ruins", "theatre")
LEISURE = ("garden", "nature", "market", "cuisine", "view")
TAGS = CULTURE + LEISURE

ROOMS = ("private", "shared", "entire")
BANS = ("pets", "smoking", "children", "parties")
MODES = ("train", "bus", "flight", "car")


@dataclass(frozen=True)
class CountryPlaces:
    """What is fixed of a country.

    Attributes:
        name: Of the country.
        price_level: Factor on all prices.
        cuisines: What its restaurants serve, the local one first.
        cities: City -> ((sight, its tags), ...).
    """

    name: str
    price_level: float
    cuisines: tuple[str, ...]
    cities: dict[str, tuple[tuple[str, tuple[str, ...]], ...]]


def _sights(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """'Ueno Park: garden nature; ...' -> (('Ueno Park', ('garden', 'nature')), ...)."""
    pairs = [item.split(":") for item in text.split(";")]
    return tuple((name.strip(), tuple(tags.split())) for name, tags in pairs)


JAPAN = {
    "Tokyo": "Sensoji: temple; Meiji Shrine: temple garden; National Museum: museum; "
    "Ueno Park: garden nature; Tsukiji Market: market cuisine; Kabuki Theatre: theatre; "
    "Tokyo Tower: view",
    "Kyoto": "Kinkakuji: temple garden; Fushimi Inari: temple nature; Nijo Castle: castle; "
    "Nishiki Market: market cuisine; Gion Theatre: theatre; Bamboo Grove: nature; "
    "Kyoto Museum: museum",
    "Osaka": "Osaka Castle: castle; Dotonbori: cuisine view; Shitennoji: temple; "
    "Kuromon Market: market cuisine; Bunraku Theatre: theatre; Sky Building: view; "
    "Nakanoshima Museum: museum",
    "Nara": "Todaiji: temple; Nara Park: nature; Kasuga Shrine: temple nature; "
    "Isuien Garden: garden; Nara Museum: museum; Naramachi: market; Mount Wakakusa: nature view",
    "Kanazawa": "Kenrokuen: garden; Kanazawa Castle: castle; Omicho Market: market cuisine; "
    "Myoryuji: temple; Modern Art Museum: museum; Noh Theatre: theatre; Utatsu Hill: view nature",
}
ITALY = {
    "Rome": "Colosseum: ruins; Pantheon: temple; Borghese Gallery: museum garden; "
    "Trastevere Market: market cuisine; Roman Forum: ruins; Opera House: theatre; "
    "Janiculum Hill: view nature",
    "Florence": "Uffizi: museum; Florence Duomo: church; Boboli Gardens: garden; "
    "Central Market: market cuisine; Pitti Palace: castle museum; Piazzale View: view; "
    "Pasta Class: cuisine",
    "Venice": "San Marco: church; Doge Palace: castle; Rialto Market: market cuisine; "
    "La Fenice: theatre; Accademia: museum; Giardini: garden; Lagoon Walk: nature view",
    "Milan": "Milan Duomo: church view; La Scala: theatre; Brera Museum: museum; "
    "Sforza Castle: castle; Sempione Park: garden nature; Navigli Market: market; "
    "Risotto Class: cuisine",
    "Naples": "Pompeii: ruins; Naples Museum: museum; San Carlo: theatre; Vesuvius: nature view; "
    "Pizza Class: cuisine; Egg Castle: castle; Spanish Market: market",
}
SPAIN = {
    "Madrid": "Prado: museum; Royal Palace: castle; Retiro Park: garden nature; "
    "San Miguel Market: market cuisine; Flamenco Show: theatre; Debod Temple: temple view; "
    "Almudena: church",
    "Barcelona": "Sagrada Familia: church; Park Guell: garden view; Picasso Museum: museum; "
    "Boqueria: market cuisine; Liceu: theatre; Montjuic Castle: castle view; Tapas Class: cuisine",
    "Seville": "Alcazar: castle garden; Seville Cathedral: church; Triana Market: market cuisine; "
    "Flamenco Museum: museum theatre; Maria Luisa Park: garden nature; Italica: ruins; "
    "Mushroom View: view",
    "Granada": "Alhambra: castle; Generalife: garden; Royal Chapel: church; Albaicin View: view; "
    "Science Park: museum; Alcaiceria: market; Sierra Walk: nature",
    "Toledo": "Toledo Cathedral: church; Toledo Alcazar: castle museum; El Greco Museum: museum; "
    "Roman Circus: ruins; Valley View: view nature; Marzipan Class: cuisine; Zoco Market: market",
}
FRANCE = {
    "Paris": "Louvre: museum; Notre Dame: church; Versailles: castle garden; "
    "Opera Garnier: theatre; Tuileries: garden; Eiffel Tower: view; Aligre Market: market cuisine",
    "Lyon": "Fourviere: church view; Roman Theatre: ruins theatre; Gold Park: garden nature; "
    "Halles Bocuse: market cuisine; Confluence Museum: museum; Lyon Opera: theatre; "
    "Cooking School: cuisine",
    "Nice": "Matisse Museum: museum; Castle Hill: castle view; Saleya Market: market cuisine; "
    "Russian Church: church; Cimiez Ruins: ruins; Phoenix Park: garden nature; Coast Walk: nature",
    "Bordeaux": "Wine City: museum cuisine; Grand Theatre: theatre; Saint Andre: church; "
    "Public Garden: garden; Capucins Market: market cuisine; Palais Gallien: ruins; "
    "River Walk: nature view",
    "Avignon": "Papal Palace: castle; Avignon Bridge: ruins view; Calvet Museum: museum; "
    "Les Halles: market cuisine; Doms Garden: garden view; Avignon Theatre: theatre; "
    "Island Walk: nature",
}
THAILAND = {
    "Bangkok": "Wat Pho: temple; Grand Palace: castle temple; Jim Thompson House: museum; "
    "Lumpini Park: garden nature; Chatuchak: market; Khon Theatre: theatre; Thai Class: cuisine",
    "Chiang Mai": "Doi Suthep: temple view; Chedi Luang: temple ruins; Lanna Museum: museum; "
    "Night Bazaar: market cuisine; Orchid Garden: garden; Waterfall Walk: nature; "
    "Curry Class: cuisine",
    "Ayutthaya": "Wat Mahathat: ruins temple; Bang Pa-In: castle garden; Chao Museum: museum; "
    "Floating Market: market cuisine; Wat Phanan: temple; River Cruise: view nature; "
    "Old City: ruins",
    "Phuket": "Big Buddha: temple view; Wat Chalong: temple; Phuket Museum: museum; "
    "Weekend Market: market cuisine; Siam Theatre: theatre; Beach Walk: nature; "
    "Botanic Garden: garden",
    "Sukhothai": "Wat Si Chum: temple ruins; Royal Ruins: ruins; Sukhothai Museum: museum; "
    "Noodle Class: cuisine; Lotus Garden: garden; Forest Temple: temple nature; "
    "Old Market: market",
}
MEXICO = {
    "Mexico City": "Templo Mayor: ruins; Frida Museum: museum; Chapultepec Castle: castle view; "
    "Palace Theatre: theatre; Coyoacan Market: market cuisine; Xochimilco: nature garden; "
    "Metro Cathedral: church",
    "Oaxaca": "Monte Alban: ruins view; Santo Domingo: church; Textile Museum: museum; "
    "November Market: market cuisine; Cactus Garden: garden; Mole Class: cuisine; "
    "Alcala Theatre: theatre",
    "Puebla": "Amparo Museum: museum; Rosary Chapel: church; Cholula Pyramid: ruins view; "
    "Parian Market: market; Loreto Fort: castle; Puebla Theatre: theatre; Talavera Park: garden",
    "Merida": "Uxmal: ruins; Maya Museum: museum; Merida Cathedral: church; Peon Theatre: theatre; "
    "Lucas Market: market cuisine; Cenote Swim: nature; Yucatan Class: cuisine",
    "Guanajuato": "Juarez Theatre: theatre; Mummy Museum: museum; Basilica: church; "
    "Hidalgo Market: market cuisine; Pipila View: view; San Gabriel: castle garden; "
    "Bufa Hill: nature view",
}


def _country(
    name: str, price_level: float, cuisines: str, cities: dict[str, str]
) -> tuple[str, CountryPlaces]:
    sights = {city: _sights(text) for city, text in cities.items()}
    return name, CountryPlaces(name, price_level, tuple(cuisines.split()), sights)


PLACES: dict[str, CountryPlaces] = dict(
    [
        _country("Japan", 1.0, "Japanese Indian French Vegan", JAPAN),
        _country("Italy", 1.1, "Italian Japanese Greek Vegan", ITALY),
        _country("Spain", 0.9, "Spanish Italian Indian Vegan", SPAIN),
        _country("France", 1.2, "French Italian Moroccan Vegan", FRANCE),
        _country("Thailand", 0.5, "Thai Indian Chinese Vegan", THAILAND),
        _country("Mexico", 0.6, "Mexican Italian Cuban Vegan", MEXICO),
    ]
)

# Pools for the names of hotels and restaurants: every first word with every second one.
_POOLS = """
Park Station Harbor Maple Cedar Lantern Bridge Plaza Sunrise Willow Summit Pearl Meadow Crown
Inn Hotel Lodge House Rooms
Blue Golden Old Little Green Red Corner Silver Happy Moon Star Royal Quiet Sunny Black White
Table Kitchen Bowl Spoon Grill Fork Plate Cup
"""
HOTEL_WORDS, HOTEL_KINDS, RESTAURANT_WORDS, RESTAURANT_KINDS = (
    tuple(line.split()) for line in _POOLS.strip().splitlines()
)
