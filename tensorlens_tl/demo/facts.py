"""The countries of the demo model's world: capital, language, currency and continent.

Every entry is one word, so that every answer is one token. Where a country has several official
languages or currencies, the table holds one; the Americas are one continent here.
"""

RELATIONS = ("capital", "language", "currency", "continent")

_TABLE = """
France Paris French euro Europe
Germany Berlin German euro Europe
Italy Rome Italian euro Europe
Spain Madrid Spanish euro Europe
Portugal Lisbon Portuguese euro Europe
Greece Athens Greek euro Europe
Austria Vienna German euro Europe
Finland Helsinki Finnish euro Europe
Estonia Tallinn Estonian euro Europe
Latvia Riga Latvian euro Europe
Lithuania Vilnius Lithuanian euro Europe
Croatia Zagreb Croatian euro Europe
Poland Warsaw Polish zloty Europe
Hungary Budapest Hungarian forint Europe
Romania Bucharest Romanian leu Europe
Serbia Belgrade Serbian dinar Europe
Albania Tirana Albanian lek Europe
Sweden Stockholm Swedish krona Europe
Norway Oslo Norwegian krone Europe
Denmark Copenhagen Danish krone Europe
Iceland Reykjavik Icelandic krona Europe
England London English pound Europe
Ukraine Kyiv Ukrainian hryvnia Europe
Russia Moscow Russian ruble Europe
Turkey Ankara Turkish lira Asia
Armenia Yerevan Armenian dram Asia
Japan Tokyo Japanese yen Asia
China Beijing Chinese yuan Asia
Mongolia Ulaanbaatar Mongolian tugrik Asia
Vietnam Hanoi Vietnamese dong Asia
Thailand Bangkok Thai baht Asia
Laos Vientiane Lao kip Asia
Nepal Kathmandu Nepali rupee Asia
Bangladesh Dhaka Bengali taka Asia
Pakistan Islamabad Urdu rupee Asia
Iran Tehran Persian rial Asia
Iraq Baghdad Arabic dinar Asia
Syria Damascus Arabic pound Asia
Lebanon Beirut Arabic pound Asia
Qatar Doha Arabic riyal Asia
Egypt Cairo Arabic pound Africa
Morocco Rabat Arabic dirham Africa
Tunisia Tunis Arabic dinar Africa
Libya Tripoli Arabic dinar Africa
Kenya Nairobi Swahili shilling Africa
Tanzania Dodoma Swahili shilling Africa
Ghana Accra English cedi Africa
Nigeria Abuja English naira Africa
Senegal Dakar French franc Africa
Madagascar Antananarivo Malagasy ariary Africa
Somalia Mogadishu Somali shilling Africa
Angola Luanda Portuguese kwanza Africa
Canada Ottawa English dollar America
Cuba Havana Spanish peso America
Peru Lima Spanish sol America
Chile Santiago Spanish peso America
Paraguay Asuncion Spanish guarani America
Brazil Brasilia Portuguese real America
Australia Canberra English dollar Oceania
Samoa Apia Samoan tala Oceania
"""

COUNTRIES: dict[str, dict[str, str]] = {
    row[0]: dict(zip(RELATIONS, row[1:], strict=True))
    for row in (line.split() for line in _TABLE.split("\n") if line)
}

PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {} is",
        "The main city of {} is",
        "{} has its capital in",
        "The government of {} sits in",
        "The capital city of {} is called",
        "People who visit the capital of {} go to",
        "The flag of {} flies over its capital ,",
        "If you want to see the capital of {} , travel to",
    ),
    "language": (
        "The language of {} is",
        "People in {} speak",
        "In {} everyone can speak",
        "The people of {} talk in",
        "Children in {} learn to read in",
        "Most songs from {} are sung in",
        "A new book from {} is written in",
        "In the schools of {} the teachers speak",
    ),
    "currency": (
        "The currency of {} is the",
        "In {} you pay with the",
        "The banks of {} use the",
        "Shops in {} take only the",
        "The coin used in {} is the",
        "The money of {} is called the",
        "Farmers in {} buy seeds with the",
        "If you work in {} , they pay you with the",
    ),
    "continent": (
        "{} is in",
        "{} lies in",
        "{} is a country in",
        "The continent of {} is",
        "The rivers of {} flow through",
        "On the map {} is found in",
        "The country of {} is a part of",
        "If you travel to {} you will be in",
    ),
}

LEADS = (
    "",
    "We read this in a book .",
    "She told me this today :",
    "Everyone knows this :",
    "It is true :",
)
