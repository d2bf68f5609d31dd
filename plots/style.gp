# Common to all pictures: a look, and a colour, mark and dash for each series.
#
# The colours are Okabe and Ito's and, of the delta rules, three of Paul Tol's, which the colour-blind
# tell apart; marks and dashes say the same again without them. They depend on the name alone, so a series looks alike in every picture,
# whatever else is in it.

if (!exists("height")) height = 620
if (format eq "svg") {
	set terminal svg size 1000,height font "DejaVu Sans,15" background "white" linewidth 1.6
} else {
	set terminal pngcairo size 1000,height font "DejaVu Sans,15" linewidth 2
}
set output output
set encoding utf8

set border 3 linecolor rgb "#444444" linewidth 0.7
set tics nomirror
set grid linecolor rgb "#cccccc" linewidth 0.4
set key outside right top Left reverse noenhanced spacing 1.2 samplen 2.5

# Powers of two: 512, 1K, 128K.
octave(e) = e < 10 ? sprintf("%d", 2 ** e) : sprintf("%dK", 2 ** (e - 10))

# Labels at 1, 2, 5, 10, ... where that is not too many, else at powers of ten. Label number k:
digit(k) = int(word("1 2 5", 1 + k % 3))
power(k) = k / 3 - 6
tic(k) = digit(k) * 10.0 ** power(k)
scientific(k) = digit(k) == 1 ? sprintf("10^{%d}", power(k)) \
                              : sprintf("%d·10^{%d}", digit(k), power(k))
fine(low, high) = log10(high / low) < 2.5

starts(s, prefix) = s[1:strlen(prefix)] eq prefix
has(s, part) = strstrt(s, part) > 0
# The chunk length in a name such as "rat L=16"; 16 where there is none.
chunk(s) = has(s, "L=") ? int(word(s[strstrt(s, "L=") + 2:], 1)) : 16

rat_colour(l) = l <= 16 ? "#0072B2" : l <= 64 ? "#56B4E9" : "#CC79A7"
colour(s) = starts(s, "attention")  ? "#D55E00" \
          : starts(s, "swa")        ? "#E69F00" \
          : starts(s, "recurrence") ? "#009E73" \
          : starts(s, "ratplus")    ? "#44AA99" \
          : starts(s, "rat")        ? rat_colour(chunk(s)) \
          : starts(s, "gla")        ? "#000000" \
          : starts(s, "linear")     ? "#F0E442" \
          : starts(s, "retnet")     ? "#CC79A7" \
          : starts(s, "mamba2")     ? "#0072B2" \
          : starts(s, "mamba")      ? "#44AA99" \
          : starts(s, "hgrn2")      ? "#56B4E9" \
          : starts(s, "hgrn")       ? "#E69F00" \
          : starts(s, "delta_net")  ? "#117733" \
          : starts(s, "gated_delta_net") ? "#882255" \
          : starts(s, "kda")        ? "#999933" \
          : starts(s, "rwkv6")      ? "#AA4499" : "#777777"

delta_rule(s) = starts(s, "delta_net") || starts(s, "gated_delta_net") || starts(s, "kda")
# Hybrids are dashed, dotted what a named provider ran or what has no positions; delta rules have
# dashes and dots.
dash(s) = has(s, "[") || has(s, "NoPE") ? 3 : has(word(s, 1), "-") ? 2 : delta_rule(s) ? 4 : 1

# Filled marks; RAT's go by the octave of the chunk length. Open ones where the line is not solid.
plain_mark(s) = starts(s, "attention")  ? 7 \
              : starts(s, "recurrence") ? 5 \
              : starts(s, "swa")        ? 4 \
              : starts(s, "gla")        ? 6 \
              : starts(s, "linear")     ? 2 \
              : starts(s, "retnet")     ? 9 \
              : starts(s, "mamba2")     ? 11 \
              : starts(s, "mamba")      ? 15 \
              : starts(s, "hgrn2")      ? 13 \
              : starts(s, "hgrn")       ? 12 \
              : starts(s, "delta_net")  ? 8 \
              : starts(s, "gated_delta_net") ? 10 \
              : starts(s, "kda")        ? 14 \
              : starts(s, "rwkv6")      ? 15 \
              : starts(s, "ratplus")    ? 13 \
              : starts(s, "rat")        ? int(word("9 11 13 15", 1 + int(log(chunk(s)) / log(2) + 0.5) % 4)) : 3
open_mark(mark) = mark % 2 ? mark - 1 : mark
mark(s) = dash(s) > 1 ? open_mark(plain_mark(s)) : plain_mark(s)

# Of lines that look alike, the same series with other heads say, all but the first get other marks.
alike(s, t) = colour(s) eq colour(t) && dash(s) == dash(t) && mark(s) == mark(t)
rank(list, i) = i < 2 ? 0 : (sum [j = 1:i - 1] alike(word(list, j), word(list, i)))
mark_in(list, i) = 1 + (mark(word(list, i)) - 1 + 2 * rank(list, i)) % 15
