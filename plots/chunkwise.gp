# Time of one operation against sequence length, a line per provider: attention dashed, linear
# attention solid, its chunk length by the mark.
#
# gnuplot -e "format='png'; output='x.png'; data='x.gp'; name='Linear attention'" FILE

load data
height = 720
load "plots/style.gp"
set key outside below center horizontal maxcols 2 font ",13"

set title sprintf("%s: %s\n%s", name, shape, device) noenhanced
set logscale x 2
set logscale y 10
set xtics ("1" 1)
set for [e = 1:24] xtics add (octave(e) 2 ** e)
set format y "%g"
set xlabel "sequence length T"
set ylabel "ms"
set offsets graph 0.03, graph 0.03, 0, 0

stats $data using 2 nooutput
set yrange [STATS_min / 1.25:STATS_max * 1.25]
if (fine(STATS_min, STATS_max)) {
	set ytics (1)
	set for [k = 0:36] ytics add (tic(k))
}

# "linear_attention_forward L=64 [cublas]": a colour for the provider, a mark for the chunk.
linear(s) = starts(s, "linear")
maker(s) = s[strstrt(s, "[") + 1:strlen(s) - 1]
colour(s) = starts(maker(s), "cublas")            ? "#000000" \
          : starts(maker(s), "cudnn")             ? "#E69F00" \
          : starts(maker(s), "hopper_material")   ? "#0072B2" \
          : starts(maker(s), "hopper")            ? "#D55E00" \
          : starts(maker(s), "portable_material") ? "#56B4E9" \
          : starts(maker(s), "portable")          ? "#CC79A7" : "#009E73"
mark(s) = linear(s) ? (has(s, "L=64") ? 7 : 5) : 6
dash(s) = linear(s) ? 1 : 2
# " L=64", and whatever else tells it from others.
details(s) = s[strlen(word(s, 1)) + 1:strstrt(s, "[") - 2]
label(s) = (linear(s) ? "linear" : "softmax") . details(s) . ", " . maker(s)
plot for [i = 1:words(labels)] $data index i - 1 using 1:2 with linespoints \
     title label(word(labels, i)) linecolor rgb colour(word(labels, i)) \
     pointtype mark_in(labels, i) pointsize 1.2 dashtype dash(word(labels, i))
